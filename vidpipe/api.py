"""The library in a few calls: files to files, frames to frames, arrays to arrays."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidpipe.device import CPU
from vidpipe.errors import GraphError, InputError, SpecError, did_you_mean
from vidpipe.frame import Color, Frame, FrameSpec, Matrix, Range, pixel_format
from vidpipe.graph import Graph, Node
from vidpipe.link import Link, LinkClosed
from vidpipe.pipeline import Pipeline, Report
from vidpipe.providers import Target
from vidpipe.stage import FrameSource, Sink, options_of

if TYPE_CHECKING:
    from vidpipe.model.choose import Choice
    from vidpipe.segments import SplitRun
    from vidpipe.trace import Tracer

QUALITIES = ("nano", "fast", "quality")
PathLike = str | os.PathLike[str]


def model_chain(
    *,
    model: PathLike | None = None,
    scale: float | None = None,
    denoise: float | None = None,
    quality: str | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Return the stages between decoder and encoder for what was asked.

    Args:
        model: name of a built-in model or path of an ONNX file; by default the clean model
            of the scale and quality.
        scale: wanted enlargement, 1 to 16; by default the model's own, or 2.
        denoise: strength of noise and artefact removal, 0 to 1; None is all of it.
        quality: tier of the built-in models: "nano", "fast" or "quality"; by default the one
            that suits the device, nano on a CPU and fast on a GPU.
        device: what the models will run on, as `--device` takes it; "auto" counts as a CPU.

    Returns:
        Options of each stage, with "use" among them. Enlarging is repeated until the picture
        is large enough, and a resize brings it to a scale that is not a power of the model's.

    Raises:
        InputError: a value is out of range, or nothing would be done.
        ModelError: the model cannot be used.
    """
    from vidpipe.model.descriptor import describe, find_model

    if quality is None:
        on_gpu = device not in (None, "auto") and Target.parse(str(device)).kind == "gpu"
        quality = "fast" if on_gpu else "nano"
    if quality not in QUALITIES:
        raise InputError(f"quality is '{quality}'", hint=f"Use {', '.join(QUALITIES)}")
    if denoise is not None and not 0 <= denoise <= 1:
        raise InputError(f"denoise is {denoise}, expected 0 to 1")
    if scale is not None and not (math.isfinite(scale) and 1 <= scale <= 16):
        raise InputError(f"scale is {scale}, expected 1 to 16")

    if model is None:
        # Real files are compressed: there the plain doublers can do worse than Lanczos.
        same_size = "fast" if quality == "quality" else quality
        model = f"clean-1x-{same_size}" if scale == 1 else f"clean-2x-{quality}"
    first = describe(find_model(str(model)))
    target = float(scale if scale is not None else first.scale)
    if denoise is not None and first.strength is None:
        raise InputError(
            f"model '{first.name}' has no strength to set with denoise",
            hint="Use a clean model, such as clean-2x-nano",
        )
    stage: dict[str, Any] = {"use": "model", "model": str(model)}
    if denoise is not None:
        stage["strength"] = float(denoise)
    chain = [stage]
    reached = first.scale
    # Cleaning once is enough, so a clean model is followed by plain doublers.
    cleans = first.strength is not None or first.scale == 1
    repeat = {"use": "model", "model": f"{quality}-2x"} if cleans else stage
    while reached < target:
        step = describe(find_model(repeat["model"])).scale
        chain.append(dict(repeat))
        reached *= step
    if not math.isclose(reached, target):
        chain.append({"use": "resize", "scale": target / reached})
    return chain


def build_graph(
    source: PathLike | None,
    destination: PathLike | None,
    *,
    graph: PathLike | None = None,
    model: PathLike | None = None,
    scale: float | None = None,
    denoise: float | None = None,
    quality: str | None = None,
    device: str | None = None,
    prefer: str = "speed",
    precision: str = "auto",
    overrides: Sequence[str] = (),
    **options: Any,
) -> Graph:
    """Return the graph for one file.

    Args:
        source: the input file, for the graph's decode stages that name none.
        destination: the output file, for its encode stage that names none.
        graph: name of a shipped graph or path of a TOML file; by default decode, the chain
            of `model_chain`, encode.
        model, scale, denoise, quality: see `model_chain`.
        device: what the models run on, such as "cpu", "cuda:1" or "openvino"; the decoder
            leaves the frames where that takes them. None and "auto" choose by what is there
            and by a short measurement, for the stages that say nothing themselves.
        prefer: "speed", "latency" or "efficiency".
        precision: "auto", "fp32", "fp16" or "int8"; "fp8" or "fp4" on "rtx". See the model stage.
        overrides: "stage.key=value" each; they win over everything else.
        options: options of the decode, model and encode stages, such as `start_s`, `threads`,
            `wait_compile` or `crf`; each goes to all the stages that take it.

    Raises:
        GraphError: the graph is wrong or does not fit the other arguments.
        DeviceError: the device is not known, or nothing can run models here.
    """
    from vidpipe.model.choose import choose

    def choice_for(first: str) -> Choice:
        threads = options.get("threads") or 0
        size = partial(_size_of, source)
        return choose(device, first, size, prefer=prefer, precision=precision, threads=threads)

    choice: Choice | None = None
    if graph is None:
        request: dict[str, Any] = {
            "model": model,
            "scale": scale,
            "denoise": denoise,
            "quality": quality,
        }
        choice = choice_for(str(model_chain(**request)[0]["model"]))
        built = _file_graph(**request, device=choice.device)
    else:
        if scale is not None:
            raise GraphError(
                "scale and graph do not go together", hint="The graph's models set the scale"
            )
        built = Graph.load(Path(graph))
        for key, value in (("model", model), ("strength", denoise)):
            nodes = built.using("model")
            if value is not None and len(nodes) != 1:
                raise GraphError(
                    f"{built.origin} has {len(nodes)} model stages",
                    hint=f"Choose one: --set STAGE.{key}=VALUE",
                )
            if value is not None:
                built.set(nodes[0].name, key, str(value) if key == "model" else value)
    _set_everywhere(built, options)
    if prefer != "speed":
        _set_everywhere(built, {"prefer": prefer})
    if precision != "auto":
        _set_everywhere(built, {"precision": precision})
    if device not in (None, "auto"):
        _place(built, choice or choice_for(""), [*built.using("decode"), *built.using("model")])
    for assignment in overrides:
        built.override(assignment)
    unplaced = [n for n in built.using("model") if n.options.get("device", "auto") == "auto"]
    if unplaced:
        choice = choice or choice_for(str(unplaced[0].options.get("model", "nano-2x")))
        decoders = [n for n in built.using("decode") if "device" not in n.options]
        _place(built, choice, [*decoders, *unplaced])
    for node in built.using("decode"):
        if source is not None:
            node.options.setdefault("path", str(source))
    open_ends = [n.name for n in built.using("encode") if "path" not in n.options]
    if destination is not None and open_ends:
        if len(open_ends) > 1:
            raise GraphError(
                f"{built.origin} has several encode stages without a path: {', '.join(open_ends)}",
                hint="Set each with --set STAGE.path=FILE",
            )
        built.set(open_ends[0], "path", str(destination))
    built.validate()
    return built


def _size_of(source: PathLike | None) -> tuple[int, int] | None:
    """Return (width, height) of a file's picture, from its header."""
    from vidpipe.errors import VidpipeError
    from vidpipe.media.probe import open_input, pick_video

    if source is None:
        return None
    try:
        with open_input(Path(source)) as container:
            video = pick_video(container, Path(source))
            return video.codec_context.width, video.codec_context.height
    except VidpipeError:  # the decode stage will say it better
        return None


def _place(graph: Graph, choice: Choice, nodes: Iterable[Node]) -> None:
    """Set where models run, and let decoders leave the frames there."""
    for node in nodes:
        if node.use == "decode":
            if choice.place != CPU:
                graph.set(node.name, "device", str(choice.place))
        else:
            graph.set(node.name, "device", choice.device)
            if choice.reason:
                graph.set(node.name, "chosen", choice.reason)


def _file_graph(**request: Any) -> Graph:
    """Return decode, the chain of models, encode; without paths."""
    built = Graph("decode, enhance, encode")
    built.add("source", "decode")
    last = _add_chain(built, "source", model_chain(**request))
    return built.add("sink", "encode", last)


def _add_chain(graph: Graph, source: str, chain: list[dict[str, Any]]) -> str:
    """Add the stages of `model_chain` one after the other; return the last one's name."""
    for number, options in enumerate(chain):
        use = options.pop("use")
        name = "resize" if use == "resize" else "model" if number == 0 else f"model{number + 1}"
        graph.add(name, use, source, **options)
        source = name
    return source


def _set_everywhere(graph: Graph, options: Mapping[str, Any]) -> None:
    """Set each option on every decode, model and encode stage that has it."""
    nodes = [node for use in ("decode", "model", "encode") for node in graph.using(use)]
    known = {node.name: options_of(node.cls) for node in nodes}
    for key, value in options.items():
        takers = [name for name, keys in known.items() if key in keys]
        if not takers:
            raise GraphError(
                f"no stage of {graph.origin} has an option '{key}'",
                hint=did_you_mean(key, sorted({k for keys in known.values() for k in keys})),
            )
        for name in takers:
            graph.set(name, key, value)


def enhance(
    source: PathLike,
    destination: PathLike,
    *,
    progress: Callable[[Pipeline | SplitRun], None] | None = None,
    **options: Any,
) -> Report:
    """Enhance one file into another, as `vidpipe run` does.

    Args:
        source: any file that FFmpeg reads.
        destination: .mp4, .mkv, .mov, .webm or .ts; complete when this returns.
        progress: called about five times a second while it runs.
        options: see `make_run` and `build_graph`.

    Returns:
        What was done; `problems` is empty when everything adds up.

    Raises:
        VidpipeError: nothing is left under the name of the destination.
    """
    return make_run(source, destination, **options).run(progress)


def make_run(
    source: PathLike,
    destination: PathLike,
    *,
    device: str | None = None,
    tracer: Tracer | None = None,
    vram_limit: str | None = None,
    **options: Any,
) -> Pipeline | SplitRun:
    """Return what enhances one file into another, ready to run.

    Args:
        source, destination: see `enhance`.
        device: see `build_graph`; "cuda:all" or a list such as "cuda:0,cuda:1" splits the
            file over several GPUs. A GPU named twice gets two workers, with a decoder each;
            "cuda:all" gives each GPU as many as `vidpipe.decoders` finds worth it.
        tracer: keeps a profile of the run.
        vram_limit: GPU memory that frames and models may take, such as "2G"; shorter rings
            and tiles keep to it.
        options: see `build_graph`.

    Raises:
        VidpipeError: see `build_graph`.
    """
    from vidpipe.model.tiling import parse_bytes
    from vidpipe.segments import SplitRun, devices_of

    limit = None if vram_limit is None else parse_bytes(vram_limit)
    devices = devices_of(device or "")
    first = str(devices[0]) if devices else device
    graph = build_graph(source, destination, device=first, **options)
    if devices:
        decoders = None if device == "cuda:all" else 1
        return SplitRun(graph, devices, decoders=decoders, tracer=tracer, vram_limit=limit)
    return Pipeline(graph, tracer=tracer, vram_limit=limit)


def read(path: PathLike, **options: Any) -> Iterator[Frame]:
    """Yield the frames of a file as the decoder gives them.

    Args:
        path: any file that FFmpeg reads.
        options: of the decode stage, such as `start_s`.

    Raises:
        MediaError: the file cannot be read.
    """
    from vidpipe.media.decode import Decode

    decoder = Decode(path=str(path), **options)
    try:
        decoder.plan()
        decoder.open()
        yield from decoder.frames()
    finally:
        decoder.close()


class _Outlet(Sink):
    """Hands frames to an iterator in another thread."""

    def __init__(self) -> None:
        self.link = Link(2)

    def plan(self, spec: FrameSpec) -> None:
        pass

    def write(self, frame: Frame) -> None:
        self.link.put(frame)

    def finish(self) -> None:
        self.link.end()

    def close(self) -> None:
        self.link.end()


def stream(
    frames: Iterable[Frame],
    *,
    model: PathLike | None = None,
    scale: float | None = None,
    denoise: float | None = None,
    quality: str | None = None,
    device: str = "auto",
    threads: int = 0,
) -> Iterator[Frame]:
    """Yield enhanced frames, while the next ones are worked on.

    Args:
        frames: any iterable of frames with strictly rising pts, such as `read(path)`.
        model, scale, denoise, quality: see `model_chain`.
        device: as for `build_graph`.
        threads: of each model on the CPU; 0 for as many as there are processors.

    Yields:
        As many frames, with the same pts. They may be kept.

    Raises:
        VidpipeError: a stage failed.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        return

    def all_frames() -> Iterator[Frame]:
        yield first
        yield from iterator

    from vidpipe.model.choose import choose

    request: dict[str, Any] = {
        "model": model,
        "scale": scale,
        "denoise": denoise,
        "quality": quality,
    }
    size = (first.spec.width, first.spec.height)
    choice = choose(device, str(model_chain(**request)[0]["model"]), size, threads=threads)
    graph = Graph("frames in, frames out").add("in", FrameSource(first.spec, all_frames()))
    last = _add_chain(graph, "in", model_chain(**request, device=choice.device))
    _set_everywhere(graph, {"threads": threads})
    _place(graph, choice, graph.using("model"))
    outlet = _Outlet()
    graph.add("out", outlet, last)
    pipeline = Pipeline(graph)
    pipeline.start()
    try:
        yield from outlet.link
    except LinkClosed:
        pass
    finally:
        if not pipeline.wait(0):
            outlet.link.close()
            pipeline.abort()
        pipeline.wait()
        if pipeline.error is not None:
            raise pipeline.error


class Enhancer:
    """Maps a picture to an enhanced picture of the same kind.

        enhancer = Enhancer("nano-2x")
        large = enhancer(picture)

    Takes NumPy arrays and anything with DLPack (PyTorch, CuPy, JAX) in host memory; gives
    back the same library's type, the same layout and dtype. Layouts: (H, W), (H, W, C) and
    (C, H, W) with C of 1 or 3 in the order R, G, B. Values: uint8 and uint16 in full range,
    floats 0..1 (computed with 16 bits: steps of 1/65535, values outside are clipped).

    Args:
        model: name of a built-in model, or path of an ONNX file.
        strength: 0 to 1, for models that have it.
        device: see the model stage.
        threads: 0 leaves it to the runtime.

    Raises:
        ModelError: the model cannot be used.
    """

    def __init__(
        self,
        model: PathLike = "nano-2x",
        *,
        strength: float | None = None,
        device: str = "auto",
        threads: int = 0,
    ) -> None:
        from vidpipe.model.stage import Model

        # The same picture is to give the same result at every call.
        self._stage = Model(
            model=str(model), strength=strength, device=device, threads=threads, wait_compile=True
        )
        self._spec: FrameSpec | None = None

    def __call__(self, picture: Any) -> Any:
        """Enhance one picture.

        Args:
            picture: see the class; shape (H, W), (H, W, C) or (C, H, W).

        Returns:
            An array of the same library, layout and dtype, `scale` times as large.

        Raises:
            SpecError: layout or dtype is not supported.
        """
        array = picture if isinstance(picture, np.ndarray) else _from_dlpack(picture)
        channels_first, planes = _to_planes(array)
        height, width = planes[0].shape
        name = "gray" if len(planes) == 1 else "gbrp"
        spec = FrameSpec(
            width=width,
            height=height,
            format=pixel_format(name if planes[0].dtype == np.uint8 else f"{name}16le"),
            color=Color(
                matrix=Matrix.RGB if len(planes) == 3 else Matrix.UNSPECIFIED, range=Range.FULL
            ),
            time_base=Fraction(1),
        )
        if self._spec is None:
            self._stage.plan(spec)
            self._stage.open()
        elif spec != self._spec:
            self._stage.replan(spec)
        self._spec = spec
        (out,) = self._stage.process(Frame(tuple(planes), spec, 0))
        result = _from_planes(out.planes, array, channels_first)
        return result if isinstance(picture, np.ndarray) else _to_library(result, picture)

    def close(self) -> None:
        """Let go of the session."""
        if self._spec is not None:
            self._stage.close()
            self._spec = None

    def __enter__(self) -> Enhancer:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _from_dlpack(picture: Any) -> np.ndarray[Any, Any]:
    if not hasattr(picture, "__dlpack__"):
        raise SpecError(
            f"a picture of type {type(picture).__name__}", hint="Give an array with DLPack"
        )
    try:
        return np.from_dlpack(picture)
    except (BufferError, RuntimeError, TypeError) as error:
        raise SpecError(
            f"the {type(picture).__name__} cannot be read in host memory: {error}",
            hint="Move it to the CPU first",
        ) from None


def _to_library(result: np.ndarray[Any, Any], like: Any) -> Any:
    """Return the result as an array of the library that `like` comes from."""
    package = sys.modules[type(like).__module__.partition(".")[0]]
    convert = getattr(package, "from_dlpack", None)
    return result if convert is None else convert(result)


def _to_planes(array: np.ndarray[Any, Any]) -> tuple[bool, list[np.ndarray[Any, Any]]]:
    """Return whether channels come first, and the planes: Y, or G, B, R."""
    if array.ndim == 2:
        channels_first, channels = True, [array]
    elif array.ndim == 3 and array.shape[2] in (1, 3):
        channels_first, channels = False, [array[:, :, c] for c in range(array.shape[2])]
    elif array.ndim == 3 and array.shape[0] in (1, 3):
        channels_first, channels = True, list(array)
    else:
        raise SpecError(
            f"a picture of shape {array.shape}",
            hint="Supported: (H, W), (H, W, C) and (C, H, W), C = 1 or 3",
        )
    if array.dtype in (np.uint8, np.uint16):
        planes = channels
    elif array.dtype.kind == "f":
        planes = [
            np.rint(np.clip(np.nan_to_num(c), 0, 1) * np.float32(65535)).astype(np.uint16)
            for c in channels
        ]
    else:
        raise SpecError(
            f"a picture of dtype {array.dtype}", hint="Supported: uint8, uint16 and floats 0..1"
        )
    return channels_first, planes if len(planes) == 1 else [planes[1], planes[2], planes[0]]


def _from_planes(
    planes: Sequence[np.ndarray[Any, Any]], like: np.ndarray[Any, Any], channels_first: bool
) -> np.ndarray[Any, Any]:
    channels = list(planes) if len(planes) == 1 else [planes[2], planes[0], planes[1]]
    if like.ndim == 2:
        result = np.array(channels[0])
    else:
        result = np.stack(channels, axis=0 if channels_first else 2)
    if like.dtype.kind == "f":
        return (result / np.float32(65535)).astype(like.dtype)
    return result


def output_path(source: Path, folder: Path, suffix: str | None = None) -> Path:
    """Return where the copy of `source` goes in an output folder.

    Containers that vidpipe does not write become .mkv, which holds everything.
    """
    from vidpipe.media.containers import CONTAINERS

    chosen = suffix or source.suffix.lower()
    return folder / (source.stem + (chosen if chosen in CONTAINERS else ".mkv"))
