"""Run a model on a picture in overlapping tiles of one size.

Every tile is a small picture of its own for the compiled graph: its planes are cut from the
frame's, and the part of its output that no tile border can have touched is copied into the
frame's output. Tiles at the picture's border touch it, so there they see what the whole
picture would show. A tile that is larger than the picture, as models of one fixed size need,
is filled up with the picture's edges.

All positions are luma samples of the input, multiples of the alignment: whole chroma samples
and whole size multiples of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from vidpipe.device import CPU, Event, Stream, import_cupy
from vidpipe.errors import SpecError
from vidpipe.frame import Array, FrameSpec
from vidpipe.model.compile import Compiled, alignment
from vidpipe.model.descriptor import Descriptor
from vidpipe.model.session import Session

if TYPE_CHECKING:
    from vidpipe.model.cuda import GraphUse

UNKNOWN_OVERLAP = 64
"""Overlap in pixels for models that look at the whole picture: seams may then show."""

_LUMA_MARGIN = 8
"""Least overlap: the chroma filters reach 6 luma samples."""

_RGB_MARGIN = 12
"""Beyond the model's own reach: 6 samples to bring chroma up, 4 to bring it down, to 2."""


@dataclass(frozen=True, slots=True)
class Span:
    """A tile along one axis.

    Attributes:
        start: where the tile begins.
        first, last: the part of the picture that it is kept for, start <= first < last.
    """

    start: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The tiles of a picture.

    Attributes:
        width, height: of every tile.
        overlap: (x, y), samples that a tile border may spoil.
        columns, rows: the tiles along each axis.
    """

    width: int
    height: int
    overlap: tuple[int, int]
    columns: tuple[Span, ...]
    rows: tuple[Span, ...]

    def __str__(self) -> str:
        count = f"{len(self.columns)}x{len(self.rows)}"
        return f"{count} of {self.width}x{self.height}, overlap {max(self.overlap)}"


def spans(size: int, tile: int, overlap: int, align: int) -> tuple[Span, ...]:
    """Return the tiles along one axis.

    Args:
        size: of the picture.
        tile: of the tiles; a multiple of `align`.
        overlap: a multiple of `align`, less than half a tile.
        align: of all positions.
    """
    padded = -(-size // align) * align
    if padded <= tile:
        return (Span(0, 0, padded),)
    step = tile - 2 * overlap
    found: list[Span] = []
    start = first = 0
    while True:
        start = min(start, padded - tile)
        last = padded if start == padded - tile else start + tile - overlap
        found.append(Span(start, first, last))
        if last == padded:
            return tuple(found)
        first = last
        start += step


def overlaps(model: Descriptor, spec: FrameSpec) -> tuple[int, int]:
    """Return the overlap (x, y) that keeps tiles free of their borders, aligned."""
    reach = UNKNOWN_OVERLAP if model.overlap is None else model.overlap
    least = max(reach, _LUMA_MARGIN) if model.channels == "luma" else reach + _RGB_MARGIN
    x, y = alignment(model, spec)
    return -(-least // x) * x, -(-least // y) * y


def lay_out(model: Descriptor, spec: FrameSpec, width: int, height: int) -> Layout:
    """Return the tiles of this size that cover a picture.

    Raises:
        SpecError: the tiles are too small for the model's overlap, or not aligned.
    """
    align = alignment(model, spec)
    overlap = overlaps(model, spec)
    axes = []
    for i, (tile, size) in enumerate(((width, spec.width), (height, spec.height))):
        if tile % align[i] or tile < align[i]:
            raise SpecError(
                f"tiles of {width}x{height} do not fit model '{model.name}' on {spec.format}: "
                f"sizes must be multiples of {align[0]}x{align[1]}"
            )
        over = overlap[i]
        if size > tile and tile - 2 * over < align[i]:
            if model.size is None:
                least = 2 * over + align[i]
                raise SpecError(
                    f"tiles of {width}x{height} are too small for model '{model.name}', which "
                    f"needs {over} pixels of overlap on each side",
                    hint=f"Use at least {least}x{least}",
                )
            over = (tile - align[i]) // 2 // align[i] * align[i]
        axes.append((over, spans(size, tile, over, align[i])))
    (over_x, columns), (over_y, rows) = axes
    return Layout(width, height, (over_x, over_y), columns, rows)


def choose(model: Descriptor, whole: Compiled, limit_bytes: int) -> Layout | None:
    """Return the largest tiles whose estimated memory stays within a limit.

    Args:
        model: the model.
        whole: its graph for the whole picture.
        limit_bytes: for constants and tensors of one run.

    Returns:
        The tiles, or None if the whole picture is within the limit.

    Raises:
        SpecError: not even the smallest tiles are.
    """
    peak = peak_bytes(whole.proto)
    if peak <= limit_bytes:
        return None
    spec = whole.spec
    align, overlap = alignment(model, spec), overlaps(model, spec)
    size = [-(-n // a) * a for n, a in zip((spec.width, spec.height), align, strict=True)]
    least = [min(n, 2 * o + a) for n, o, a in zip(size, overlap, align, strict=True)]
    weights = weight_bytes(whole.proto)
    per_pixel = (peak - weights) / (size[0] * size[1])
    while size != least:
        # Split along the longer side that can still be split.
        axis = max((0, 1), key=lambda i: (size[i] > least[i], size[i]))
        half = size[axis] // 2 + overlap[axis]
        size[axis] = max(least[axis], -(-half // align[axis]) * align[axis])
        if weights + per_pixel * size[0] * size[1] <= limit_bytes:
            return lay_out(model, spec, *size)
    needed = weights + per_pixel * size[0] * size[1]
    raise SpecError(
        f"model '{model.name}' needs about {needed / 2**20:.2f} MiB even in its smallest tiles, "
        f"{size[0]}x{size[1]}; the limit is {limit_bytes / 2**20:.2f} MiB",
        hint="Raise the memory limit, or use a smaller model",
    )


def fits(whole: Compiled, frames: int, limit_bytes: int) -> bool:
    """Return whether so many frames at once, without tiles, are estimated to be within a limit.

    Args:
        whole: the graph for the whole picture.
        frames: run at once by one session, which has the constants once.
        limit_bytes: for constants and tensors.
    """
    weights = weight_bytes(whole.proto)
    return weights + frames * (peak_bytes(whole.proto) - weights) <= limit_bytes


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Return the size of a model's constants."""
    return sum(_bytes(i.data_type, i.dims) for i in proto.graph.initializer)


def peak_bytes(proto: onnx.ModelProto) -> int:
    """Estimate the most memory that running a graph of static shapes takes at once.

    Constants, plus the largest sum of tensors that are alive at once when the nodes run in
    their order: each from the node that makes it to the last one that reads it. A
    convolution's own work space is not in it.
    """
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    size = {
        v.name: _bytes(
            v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim]
        )
        for v in (*graph.value_info, *graph.input, *graph.output)
    }
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    alive = peak = sum(size[v.name] for v in (*graph.input, *graph.output))
    outputs = {v.name for v in graph.output}
    for i, node in enumerate(graph.node):
        alive += sum(size.get(n, 0) for n in node.output if n not in outputs)
        peak = max(peak, alive)
        made = {n for n in node.input if last[n] == i}
        boundary = {v.name for v in graph.input}
        alive -= sum(size.get(n, 0) for n in made if n not in boundary)
    return weight_bytes(proto) + peak


def _bytes(kind: int, dims: Sequence[int]) -> int:
    if kind == onnx.TensorProto.UNDEFINED:
        return 0
    width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
    return int(np.prod([max(d, 0) for d in dims], dtype=np.int64)) * width


class TiledSession:
    """Runs a session of the tiles' size over whole pictures; itself a `Session`.

    Args:
        session: compiled for `tile_spec(spec, layout)`.
        compiled: what it runs.
        layout: the tiles.
        spec: of the whole picture.
        out: what comes out of it.
        stream: what the copies are queued on; None on the CPU.
    """

    def __init__(
        self,
        session: Session,
        compiled: Compiled,
        layout: Layout,
        spec: FrameSpec,
        out: FrameSpec,
        stream: Any = None,
    ) -> None:
        empty = np.empty if spec.device == CPU else import_cupy(spec.device).empty
        self._stream = nullcontext() if stream is None else stream
        self._session = session
        self._layout = layout
        self._spec = spec
        self._scale = out.width // spec.width
        self._inputs = [empty(t.plane_shape, t.dtype) for t in compiled.inputs]
        self._outputs = [empty(t.plane_shape, t.dtype) for t in compiled.outputs]
        session.bind(0, self._outputs)
        self._slots: dict[int, Sequence[Array]] = {}

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """See `Session.bind`."""
        self._slots[slot] = outputs

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """See `Session.run`."""
        results = self._slots[slot]
        event = None
        for row in self._layout.rows:
            for column in self._layout.columns:
                with self._stream:
                    for i, plane in enumerate(inputs):
                        self._cut(i, plane, column, row)
                event = self._session.run(0, self._inputs, stream)
                with self._stream:
                    for i, plane in enumerate(results):
                        self._paste(i, plane, column, row)
        return event if stream is None else stream.record()

    def prepare(self) -> GraphUse | None:
        """See `Session.prepare`."""
        return self._session.prepare()

    def set_strength(self, value: float) -> None:
        """See `Session.set_strength`."""
        self._session.set_strength(value)

    def nodes_by_provider(self) -> dict[str, int]:
        """See `Session.nodes_by_provider`."""
        return self._session.nodes_by_provider()

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()
        self._slots.clear()

    def _shifts(self, plane: int) -> tuple[int, int]:
        return self._spec.format.subsampling if plane else (0, 0)

    def _cut(self, index: int, plane: Array, column: Span, row: Span) -> None:
        """Copy a tile of a plane into the session's input, filled up with edges."""
        shift_x, shift_y = self._shifts(index)
        buffer = self._inputs[index]
        y, x = row.start >> shift_y, column.start >> shift_x
        part = plane[y : y + buffer.shape[0], x : x + buffer.shape[1]]
        height, width = part.shape[:2]
        buffer[:height, :width] = part
        buffer[:height, width:] = buffer[:height, width - 1 : width]
        buffer[height:] = buffer[height - 1 : height]

    def _paste(self, index: int, plane: Array, column: Span, row: Span) -> None:
        """Copy what is kept of the session's output into the frame's."""
        shift_x, shift_y = self._shifts(index)
        (y0, y1, from_y), (x0, x1, from_x) = (
            (
                s.first * self._scale >> shift,
                s.last * self._scale >> shift,
                (s.first - s.start) * self._scale >> shift,
            )
            for s, shift in ((row, shift_y), (column, shift_x))
        )
        height, width = min(y1, plane.shape[0]) - y0, min(x1, plane.shape[1]) - x0
        source = self._outputs[index][from_y : from_y + height, from_x : from_x + width]
        plane[y0 : y0 + height, x0 : x0 + width] = source


def tile_spec(spec: FrameSpec, layout: Layout) -> FrameSpec:
    """Return the spec of one tile: the picture's, with the colour that it resolves to."""
    color = replace(spec.color, matrix=spec.color.matrix, range=spec.resolved_color().range)
    if spec.format.model == "yuv":
        color = replace(color, matrix=_pinned_matrix(spec))
    return replace(spec, width=layout.width, height=layout.height, color=color)


def _pinned_matrix(spec: FrameSpec) -> int:
    """Return the matrix by the whole picture's size, not by the tile's."""
    from vidpipe.frame import Matrix

    if spec.color.matrix != Matrix.UNSPECIFIED:
        return spec.color.matrix
    return spec.resolved_color().matrix


def parse_size(text: str) -> tuple[int, int]:
    """Read "640x360" as (640, 360).

    Raises:
        SpecError: it is not that.
    """
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise SpecError(f"tile is '{text}', expected auto, off, or a size such as 640x360")
    return int(width), int(height)


def parse_bytes(text: str) -> int:
    """Read "2G", "512M" or a number of bytes.

    Raises:
        SpecError: it is not that.
    """
    units: dict[str, int] = {"K": 2**10, "M": 2**20, "G": 2**30}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = units.get(number[-1:], 1)
    digits = number[:-1] if number[-1:] in units else number
    try:
        value = float(digits) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < 2**63:
        raise SpecError(f"memory limit is '{text}', expected a size such as 512M or 2G")
    return int(value)
