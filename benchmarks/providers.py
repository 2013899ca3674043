"""Providers and precisions: a network alone, and the whole pipeline around it, in one run.

The network is the one that other tools were measured with: luma, space-to-depth 2, six 3x3
convolutions of 32 channels, depth-to-space, at 960x540. `alone` is each provider on the bare
network, float tensors in and out; `session` the frame graph on planes; `run` is `vidpipe run` to
null, decoding included, on each provider found. Everything is measured in turns while frames flow:
loading and compiling are in no figure. Only ratios should be quoted; those of the pipeline are of
the provider that runs it fastest.
VapourSynth with vs-mlrt reached 12.7 fps at best where ONNX Runtime alone made 12.9 on the same
machine: `int8_over_vsmlrt` holds our int8 pipeline against that share of the float32 network.

Then 640x360 is doubled to a file by the nano models, encoding included: rates over 30 fps.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import vidpipe
from vidpipe.errors import VidpipeError
from vidpipe.frame import Frame
from vidpipe.graph import Graph
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import Descriptor, describe, find_model
from vidpipe.model.quantize import convert, pick
from vidpipe.model.session import HostSession
from vidpipe.model.variant import int8_copy
from vidpipe.providers import all_providers
from vidpipe.providers.base import Found, Request, find
from vidpipe.providers.runtime import default_threads, import_onnxruntime

VSMLRT_SHARE = 12.7 / 12.9
SIZE = (960, 540)
FRAMES = 24
LONG = 72
NANO = ("nano-2x", "clean-2x-nano")
TOLERATED_DB = 45.0


def measure(clip: Path, model: str, rounds: int) -> dict[str, Any]:
    """Return frames a second, and their ratios, after checking the outputs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = os.environ.get("VIDPIPE_CACHE")
        os.environ["VIDPIPE_CACHE"] = str(folder / "cache")
        try:
            figures = _network(clip, folder, rounds)
            for one in dict.fromkeys((model, *NANO)):
                figures |= _real_time(clip, folder, one, rounds)
        finally:
            if kept is None:
                del os.environ["VIDPIPE_CACHE"]
            else:
                os.environ["VIDPIPE_CACHE"] = kept
    return figures


def _network(clip: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """The network that other tools were measured with: alone, as a session, in a pipeline."""
    small = _clip(clip, folder / "540p.mkv", SIZE, FRAMES)
    frames = list(vidpipe.read(small))
    network = describe(save_network(folder / "network.onnx"))
    seen, checked = pick(len(frames))
    verdict = convert(
        network,
        folder / "network-int8.onnx",
        "int8",
        [frames[i] for i in sorted(seen)],
        [frames[i] for i in sorted(checked)],
    )
    files = {"fp32": network, "int8": describe(verdict.path)}
    providers = _providers()
    alone = "alone_cpu_fp32"
    networks = {f"alone_{label}_fp32": _alone(network, found) for label, found in providers.items()}
    sessions: dict[str, Callable[[], float]] = {}
    runs: dict[str, Callable[[], float]] = {}
    reference: list[np.ndarray[Any, Any]] | None = None
    for label, found in providers.items():
        for precision, descriptor in files.items():
            try:
                loop, picture = _session(descriptor, found, frames[0])
            except VidpipeError:
                continue
            reference = reference or picture
            _check(reference[0], picture[0], f"{label} {precision}")
            sessions[f"session_{label}_{precision}"] = loop
            runs[f"run_{label}_{precision}"] = _run(small, descriptor, label)
    fps = _interleaved({**networks, **sessions, **runs}, rounds)
    best = {
        precision: max((name for name in runs if name.endswith(precision)), key=fps.__getitem__)
        for precision in files
    }
    fastest = max(fps[name] for name in networks)
    session = max(value for name, value in fps.items() if name in sessions and "fp32" in name)
    return {
        "size": f"{SIZE[0]}x{SIZE[1]}",
        "threads": default_threads(),
        "network_int8_psnr_db": verdict.psnr_db[0],
        **{f"{label}_fps": value for label, value in fps.items()},
        "best": ", ".join(best.values()),
        "fp32_run_over_fastest_alone": fps[best["fp32"]] / fastest,
        "fp32_run_over_fastest_session": fps[best["fp32"]] / session,
        "fp32_run_over_onnxruntime_alone": fps[best["fp32"]] / fps[alone],
        "cpu_fp32_run_over_onnxruntime_alone": fps["run_cpu_fp32"] / fps[alone],
        "int8_over_vsmlrt": fps[best["int8"]] / (fps[alone] * VSMLRT_SHARE),
        "cpu_int8_over_vsmlrt": fps["run_cpu_int8"] / (fps[alone] * VSMLRT_SHARE),
    }


def save_network(path: Path) -> Path:
    """Write the network that other tools were measured with; its weights are random."""
    random = np.random.default_rng(0)
    nodes = [helper.make_node("SpaceToDepth", ["input"], ["x0"], blocksize=2)]
    constants = []
    sizes = [4, 32, 32, 32, 32, 32, 16]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        weights = random.normal(0, (2 / (9 * a)) ** 0.5 * (0.1 if last else 1), (b, a, 3, 3))
        constants += [
            numpy_helper.from_array(weights.astype(np.float32), f"w{i}"),
            numpy_helper.from_array(np.zeros(b, np.float32), f"b{i}"),
        ]
        out = f"x{i + 1}" if last else f"c{i}"
        nodes.append(
            helper.make_node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [out], pads=[1, 1, 1, 1])
        )
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"x{i + 1}"]))
    nodes.append(helper.make_node("DepthToSpace", ["x6"], ["output"], blocksize=4))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1, "H", "W"])],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    facts = {"scale": "2", "channels": "luma", "range": "0..1", "multiple": "2", "overlap": "14"}
    helper.set_model_props(proto, {f"vidpipe.{k}": v for k, v in facts.items()})
    onnx.save(proto, str(path))
    return path


def _providers() -> dict[str, Found]:
    ort = import_onnxruntime()
    found = {}
    for provider in all_providers():
        if provider.memory == "cpu" and provider.installed():
            try:
                found[provider.name] = find(provider, ort)
            except VidpipeError:
                continue
    return found


def _clip(source: Path, path: Path, size: tuple[int, int], count: int) -> Path:
    """Write some frames of a clip at another size."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number, frame in enumerate(reader.decode(video=0)):
            if number == count:
                break
            frame = frame.reformat(width=size[0], height=size[1], format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    return path


def _alone(model: Descriptor, found: Found) -> Callable[[], float]:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    request = Request(threads=default_threads(), kind=found.kind)
    options.intra_op_num_threads = request.threads
    found.provider.configure(options, request)
    asked = found.attach(options, found.provider.options(request))
    session = ort.InferenceSession(str(model.path), options, enable_fallback=0, **asked)
    feeds = {model.input: np.full((1, 1, SIZE[1], SIZE[0]), 0.5, np.float32)}
    return lambda: _rate(lambda: session.run(None, feeds))


def _rate(one: Callable[[], object]) -> float:
    """Return frames a second."""
    begin_s = time.perf_counter()
    for _ in range(FRAMES):
        one()
    return FRAMES / (time.perf_counter() - begin_s)


def _session(
    model: Descriptor, found: Found, frame: Frame
) -> tuple[Callable[[], float], list[np.ndarray[Any, Any]]]:
    wanted = found.provider
    compiled = compile_model(
        model, frame.spec, portable=wanted.portable, half=wanted.half, widen=wanted.widen
    )
    session = HostSession(compiled, found, strength=1.0)
    planes = [np.empty(t.plane_shape, t.dtype) for t in compiled.outputs]
    session.bind(0, planes)
    inputs = [np.ascontiguousarray(p) for p in frame.planes]
    session.run(0, inputs)
    picture = [p.copy() for p in planes]

    def loop() -> float:
        assert planes  # the session holds their addresses only
        return _rate(lambda: session.run(0, inputs))

    return loop, picture


def _check(reference: np.ndarray[Any, Any], picture: np.ndarray[Any, Any], label: str) -> None:
    error = float(np.square(reference.astype(np.float64) - picture).mean())
    psnr = 100.0 if error == 0 else 10 * np.log10(255**2 / error)
    if psnr < TOLERATED_DB:
        raise RuntimeError(f"{label}: {psnr:.1f} dB from the first provider's picture")


def _run(clip: Path, model: Descriptor, device: str) -> Callable[[], float]:
    def loop() -> float:
        graph = Graph()
        graph.add("source", "decode", path=str(clip))
        options = {"model": str(model.path), "device": device, "wait_compile": True}
        graph.add("model", "model", "source", **options)
        graph.add("sink", "null", "model")
        return _flow(vidpipe.Pipeline(graph).run(), FRAMES)

    return loop


def _flow(report: vidpipe.Report, frames: int) -> float:
    """Return frames a second from the first frame on: starting up is not part of it."""
    if report.problems or report.stage("model").frames_out != frames:
        raise RuntimeError(f"the pipeline lost frames: {report.problems}")
    return (frames - 1) / (report.wall_s - (report.first_frame_s or 0))


def _interleaved(loops: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return medians over the rounds, after one more; everything runs in every round."""
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(rounds + 1):
        for name, loop in loops.items():
            rate = loop()
            if round_:
                rates[name].append(rate)
    return {name: median(values) for name, values in rates.items()}


def _real_time(clip: Path, folder: Path, model: str, rounds: int) -> dict[str, Any]:
    """Frames a second of a 640x360 clip doubled to a file, over 30."""
    source = _clip(clip, folder / "360p.mkv", (640, 360), LONG)
    original = describe(find_model(model))
    files = {"fp32": original, "int8": int8_copy(original)}
    loops = {
        f"{model}_360p_{label}_{precision}_over_30_fps": _file(source, descriptor, label)
        for precision, descriptor in files.items()
        if descriptor is not None
        for label in _providers()
    }
    return {name: rate / 30 for name, rate in _interleaved(loops, rounds).items()}


def _file(source: Path, model: Descriptor, device: str) -> Callable[[], float]:
    def loop() -> float:
        report = vidpipe.enhance(
            source,
            source.with_name("out.mp4"),
            model=str(model.path),
            device=device,
            wait_compile=True,
            overwrite=True,
        )
        return _flow(report, LONG)

    return loop
