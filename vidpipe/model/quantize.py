"""`vidpipe models quantize`: a smaller or faster copy of a model, held to the original.

int8: see `vidpipe.model.ptq`. float16: constants and boundary in half precision. Both are
calibrated and checked on frames of a clip, through the same frame graph that a run puts around
the model; the frames that are checked are not those that were calibrated on. A copy that is
further from the original than `FLOORS` is not written.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper

from vidpipe.errors import ModelError, OutputError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.model import ptq, tiling
from vidpipe.model.compile import Compiled, alignment, compile_model, convert_opset
from vidpipe.model.descriptor import CLAIMS, METADATA_PREFIX, Descriptor, read_model
from vidpipe.model.precision import narrow_graph
from vidpipe.model.session import HostSession

Array: TypeAlias = np.ndarray[Any, Any]

FLOORS = {"int8": 45.0, "fp16": 60.0}
"""Least PSNR in dB of the first output plane against the original's, mean over the checked
frames. 45 dB is an error of 1.4 codes of 8 bits, 60 dB of a quarter."""

CALIBRATED_FRAMES = 20
CHECKED_FRAMES = 8

_AIM = 50.0
_CROP = (640, 360)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How close a converted model comes to the original.

    Attributes:
        path: the file that was written.
        precision: "int8" or "fp16".
        frames: how many frames were compared; no calibration frame is among them.
        psnr_db: for each output plane the mean PSNR over the frames, peak at the highest
            code; 100 where nothing differs.
        worst_db: the least PSNR of the first plane among the frames.
        vmaf_neg: of the luma against the original's, or None where it was not measured.
        float_part: which convolutions stayed in float, one of `ptq.FLOAT_PARTS`.
        reduced: whether weights are kept within 7 bits.
        bytes_before, bytes_after: sizes of the files.
    """

    path: Path
    precision: str
    frames: int
    psnr_db: tuple[float, ...]
    worst_db: float
    vmaf_neg: float | None
    float_part: str
    reduced: bool
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-compatible values."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "path": str(self.path),
            "psnr_db": list(self.psnr_db),
        }


class Meter(Protocol):
    """Something that is shown pairs of luma planes, such as a VMAF filter."""

    def add(self, reference: Array, picture: Array) -> None:
        """Take a pair, float32 (H, W), codes of 8 bits, of any sizes in turn."""

    def result(self) -> float | None:
        """Return the mean score of the pairs."""


def has_wide_products() -> bool:
    """Say whether this processor adds products of 8-bit codes without saturating at 16 bits.

    x86 processors do so with VNNI; where that cannot be found out the answer is no.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "avx512_vnni" in text or "avx_vnni" in text
    return False


def convert(
    model: Descriptor,
    out: Path,
    precision: str,
    frames: Sequence[Frame],
    held_out: Sequence[Frame],
    *,
    reduce_range: bool | None = None,
    meter: Meter | None = None,
) -> Verdict:
    """Write a copy of a model in another precision, if it is close enough.

    Args:
        model: the original, float32.
        out: the file to write; replaced if it exists. It is written whole or not at all.
        precision: "int8" or "fp16".
        frames: to calibrate on; used by int8.
        held_out: to compare on. All on the CPU; from clips of any sizes and formats.
        reduce_range: keep int8 weights within 7 bits; None: where this processor needs it.
        meter: is shown the luma of every compared pair.

    Returns:
        The figures of what was written.

    Raises:
        ModelError: the model cannot be converted, or the copy is below the floor.
        SpecError: it cannot take such frames.
        OutputError: the file cannot be written.
    """
    if precision not in FLOORS:
        raise ModelError(f"precision '{precision}' is not known", hint="Use int8 or fp16")
    if not held_out or (precision == "int8" and not frames):
        raise ModelError(
            "there are too few frames to calibrate and compare on",
            hint=f"Use a clip of at least {CALIBRATED_FRAMES + CHECKED_FRAMES} frames",
        )
    proto = convert_opset(read_model(model.path), model.name)
    _refuse_converted(proto, model)
    reduced = not has_wide_products() if reduce_range is None else reduce_range
    reduced = reduced and precision == "int8"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.stem}.{os.getpid()}.onnx")
        temporary.touch()
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written: {error.strerror or error}") from None
    trial = replace(model, path=temporary)
    try:
        if precision == "fp16":
            if not narrow_graph(proto.graph):
                raise ModelError(f"model '{model.name}' cannot be computed in float16")
            parts: Iterable[tuple[str, onnx.ModelProto]] = [("", proto)]
            trial = replace(trial, dtype=np.dtype(np.float16))
        else:
            parts = _int8(model, proto, frames, reduced)
        best: tuple[float, str, onnx.ModelProto, list[list[float]]] | None = None
        for part, result in parts:
            _label(result, model, precision)
            onnx.save(result, str(temporary))
            planes = _compare(model, trial, held_out, None)
            psnr = float(np.mean([p[0] for p in planes]))
            if best is None or psnr > best[0]:
                best = psnr, part, result, planes
            if psnr >= _AIM:
                break
        assert best is not None
        psnr, part, result, planes = best
        if psnr < FLOORS[precision]:
            raise ModelError(
                f"model '{model.name}' in {precision} comes to {psnr:.1f} dB of its own output "
                f"in float32, the floor is {FLOORS[precision]:.0f} dB",
                hint="Calibrate on a clip of the kind that it is meant for, or keep float32",
            )
        onnx.save(result, str(temporary))
        if meter is not None:
            _compare(model, trial, held_out, meter)
        size = temporary.stat().st_size
        os.replace(temporary, out)
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Verdict(
        path=out,
        precision=precision,
        frames=len(planes),
        psnr_db=tuple(_column_means(planes)),
        worst_db=min(p[0] for p in planes),
        vmaf_neg=meter.result() if meter is not None else None,
        float_part=part,
        reduced=reduced,
        bytes_before=model.path.stat().st_size,
        bytes_after=size,
    )


def pick(count: int, clips: int = 1) -> tuple[set[int], set[int]]:
    """Return which of a clip's `count` frames to calibrate on and which to compare on.

    Both lie evenly over the clip, and none is in both. `clips` share the work.
    """
    calibrated, checked = (max(2, -(-n // clips)) for n in (CALIBRATED_FRAMES, CHECKED_FRAMES))
    total = min(count, calibrated + checked)
    every = np.unique(np.linspace(0, max(count - 1, 0), total).round().astype(int)).tolist()
    checked = min(checked, len(every) // 3)
    kept = {every[int((k + 0.5) * len(every) / checked)] for k in range(checked)}
    return set(every) - kept, kept


# -- the graphs ---------------------------------------------------------------------------


def _refuse_converted(proto: onnx.ModelProto, model: Descriptor) -> None:
    kinds = {node.op_type for node in proto.graph.node}
    if kinds & {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger"}:
        raise ModelError(
            f"model '{model.name}' is quantised already", hint="Start from its float32 file"
        )
    if model.dtype != np.float32:
        raise ModelError(
            f"model '{model.name}' is in {model.dtype}", hint="Start from its float32 file"
        )


def _int8(
    model: Descriptor, proto: onnx.ModelProto, frames: Sequence[Frame], reduced: bool
) -> Iterable[tuple[str, onnx.ModelProto]]:
    """Yield int8 graphs, with ever more convolutions in float."""
    feeds = _feeds(model, frames)
    if model.channels == "luma":
        # Codes of 8 bits in limited range then stand for themselves.
        low, high = -16 / 219, 239 / 219
        unit = 255.0 if model.range == "0..255" else 1.0
        limits = low * unit, high * unit
    else:
        values = [feed[model.input] for feed in feeds]
        limits = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    for part in ptq.FLOAT_PARTS:
        try:
            yield (
                part,
                ptq.quantize_graph(
                    proto,
                    feeds,
                    image=model.input,
                    input_range=limits,
                    reduce_range=reduced,
                    float_part=part,
                ),
            )
        except ModelError:
            if not part:
                raise
            return


def _feeds(model: Descriptor, frames: Sequence[Frame]) -> list[Mapping[str, Array]]:
    """Return what the frame graph feeds the model, for each frame."""
    compiled: dict[FrameSpec, tuple[onnx.ModelProto, Compiled]] = {}
    feeds: list[Mapping[str, Array]] = []
    for number, frame in enumerate(frames):
        spec, planes = _crop(model, frame, number)
        if spec not in compiled:
            whole = compile_model(model, spec)
            compiled[spec] = ptq.prune(whole.proto, [model.input]), whole
        part, whole = compiled[spec]
        given = {
            tensor.name: plane.reshape(tensor.shape)
            for tensor, plane in zip(whole.inputs, planes, strict=True)
        }
        (value,) = ptq.evaluate(part, model.input, [given])
        feed: dict[str, Array] = {model.input: value}
        if whole.strength is not None:
            feed[whole.strength] = np.ones(whole.strength_shape, np.float32)
        feeds.append(feed)
    return feeds


def _crop(model: Descriptor, frame: Frame, number: int) -> tuple[FrameSpec, list[Array]]:
    """Return a part of a frame as a picture of its own; parts wander from frame to frame."""
    spec, align = frame.spec, alignment(model, frame.spec)
    wanted = model.size or _CROP
    if model.size is not None and (spec.width < wanted[0] or spec.height < wanted[1]):
        raise ModelError(
            f"model '{model.name}' takes {wanted[0]}x{wanted[1]} only, the clip is "
            f"{spec.width}x{spec.height}",
            hint="Calibrate on a larger clip",
        )
    size = [min(a, b) for a, b in zip(wanted, (spec.width, spec.height), strict=True)]
    if model.size is None:
        size = [n // a * a or n for n, a in zip(size, align, strict=True)]
    free = (spec.width - size[0]) // align[0], (spec.height - size[1]) // align[1]
    x, y = (
        (number * step % (room + 1)) * a for room, step, a in zip(free, (7, 5), align, strict=True)
    )
    layout = tiling.Layout(size[0], size[1], (0, 0), (), ())
    part = tiling.tile_spec(spec, layout)
    planes = []
    for index, (plane, shape) in enumerate(zip(frame.planes, part.plane_shapes(), strict=True)):
        shift_x, shift_y = spec.format.subsampling if index else (0, 0)
        top, left = y >> shift_y, x >> shift_x
        cut = plane[top : top + shape[0], left : left + shape[1]]
        planes.append(np.ascontiguousarray(cut))
    return part, planes


def _label(proto: onnx.ModelProto, model: Descriptor, precision: str) -> None:
    """Write what is known of the model, and its precision, into the file's metadata."""
    values = {entry.key: entry.value for entry in proto.metadata_props}
    for key in CLAIMS:
        known = getattr(model, key, None)
        if known not in (None, ""):
            values[METADATA_PREFIX + key] = str(known)
    values[METADATA_PREFIX + "precision"] = precision
    values[METADATA_PREFIX + "source_sha256"] = model.sha256
    del proto.metadata_props[:]
    helper.set_model_props(proto, values)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name == model.strength and value.type.tensor_type.elem_type != TensorProto.FLOAT:
            _keep_float(proto, value)


def _keep_float(proto: onnx.ModelProto, value: onnx.ValueInfoProto) -> None:
    """Let the strength input stay float32 beside a float16 graph."""
    inner = f"{value.name}/half"
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == value.name:
                node.input[i] = inner
    kind = value.type.tensor_type.elem_type
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    proto.graph.node.insert(0, helper.make_node("Cast", [value.name], [inner], name=inner, to=kind))


# -- the comparison -----------------------------------------------------------------------


def _compare(
    model: Descriptor, trial: Descriptor, frames: Sequence[Frame], meter: Meter | None
) -> list[list[float]]:
    """Return the PSNR of every output plane, for each frame."""
    sessions: dict[FrameSpec, tuple[_Runner, _Runner]] = {}
    found = []
    for number, frame in enumerate(frames):
        spec, planes = _crop(model, frame, number + 1)
        if spec not in sessions:
            sessions[spec] = _Runner(model, spec), _Runner(trial, spec)
        wanted, got = (runner(planes) for runner in sessions[spec])
        shift, bits = spec.format.shift, spec.format.bits
        found.append(
            [_psnr(a, b, ((1 << bits) - 1) << shift) for a, b in zip(wanted, got, strict=True)]
        )
        if meter is not None:
            unit = np.float32(1 << (bits - 8 + shift))
            meter.add(*(p[0].astype(np.float32) / unit for p in (wanted, got)))
    return found


class _Runner:
    """A model in its frame graph, from planes to planes."""

    def __init__(self, model: Descriptor, spec: FrameSpec) -> None:
        # Widened nodes would compute a float16 model in float32.
        compiled = compile_model(model, spec, widen=False)
        self._session = HostSession(compiled, strength=1.0)
        self._planes = [np.empty(t.plane_shape, t.dtype) for t in compiled.outputs]
        self._session.bind(0, self._planes)

    def __call__(self, planes: Sequence[Array]) -> list[Array]:
        self._session.run(0, planes)
        return [plane.copy() for plane in self._planes]


def _psnr(wanted: Array, got: Array, peak: int) -> float:
    error = float(np.square(wanted.astype(np.float64) - got).mean())
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(peak**2 / error))


def _column_means(rows: list[list[float]]) -> list[float]:
    """Return means by column; frames of grey clips have fewer planes."""
    return [
        float(np.mean([row[i] for row in rows if i < len(row)])) for i in range(max(map(len, rows)))
    ]
