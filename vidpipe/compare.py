"""How close clips are to a reference: PSNR, SSIM, VMAF-NEG and flicker of the luma.

The library part of `vidpipe compare`, which also writes a contact sheet of the places where the
clips differ most. All clips are decoded once, side by side, and compared frame by frame in the
order of decoding; they must have the reference's size.
"""

from __future__ import annotations

import gc
import heapq
import importlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidpipe.errors import InputError, MediaError, OutputError

VMAF_MODEL = "version=vmaf_v0.6.1neg"
CROP = 160  # pixels, both ways, of a contact sheet's crops
PLACES = 6  # rows of a contact sheet
_GAP = 4
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG

Luma = NDArray[np.float32]
Rgb = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Means over the compared frames of one clip, luma only.

    Attributes:
        name: the file's path as given.
        frames: how many frames were compared.
        psnr_db: mean over the frames of the PSNR with peak 255; identical frames count as 100.
        ssim: mean over the frames of the SSIM, 8x8 windows at every fourth pixel, as in FFmpeg.
        vmaf_neg: mean VMAF of the model vmaf_v0.6.1neg, or None where FFmpeg lacks libvmaf.
        flicker: mean absolute difference, in 8-bit codes, between the change from frame to frame
            and the reference's own change; 0 for one frame.
    """

    name: str
    frames: int
    psnr_db: float
    ssim: float
    vmaf_neg: float | None
    flicker: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One row of the contact sheet: a crop's frame number and its upper left corner in pixels."""

    frame: int
    x: int
    y: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The scores of all clips against one reference."""

    reference: str
    width: int
    height: int
    scores: tuple[Score, ...]
    places: tuple[Place, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return asdict(self)


def psnr(reference: Luma, picture: Luma) -> float:
    """PSNR in dB of two planes (H, W), float32 codes 0..255; identical planes give 100."""
    error = float(np.mean(np.square(reference - picture), dtype=np.float64))
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error))


def ssim(reference: Luma, picture: Luma) -> float:
    """Mean SSIM of two planes (H, W), float32 codes 0..255, both sides at least 8.

    Wang et al. 2004, eq. 13, over 8x8 windows four pixels apart, the way FFmpeg's filter does it.
    """
    if reference.shape != picture.shape or min(reference.shape) < 8:
        raise InputError(
            f"got planes of {reference.shape} and {picture.shape}, "
            "expected equal ones of 8x8 or more"
        )
    rows, columns = reference.shape[0] // 4, reference.shape[1] // 4

    def windows(values: Luma) -> NDArray[np.float64]:
        blocks = values[: rows * 4, : columns * 4].reshape(rows, 4, columns, 4)
        sums = blocks.sum((1, 3), dtype=np.float64)
        total: NDArray[np.float64] = sums[:-1, :-1] + sums[1:, :-1] + sums[:-1, 1:] + sums[1:, 1:]
        return total

    a, b = windows(reference), windows(picture)
    squares = windows(reference * reference + picture * picture)
    products = windows(reference * picture)
    c1, c2 = 0.01**2 * 255**2 * 64, 0.03**2 * 255**2 * 64 * 63
    variances = squares * 64 - a * a - b * b
    covariance = products * 64 - a * b
    values = (2 * a * b + c1) * (2 * covariance + c2)
    values /= (a * a + b * b + c1) * (variances + c2)
    return float(values.mean())


def has_vmaf() -> bool:
    """Whether the FFmpeg inside PyAV has the filter libvmaf."""
    return "libvmaf" in _av().filter.filters_available


def compare(
    reference: str | Path,
    outputs: Sequence[str | Path],
    *,
    sheet: str | Path | None = None,
    max_frames: int | None = None,
    vmaf: bool = True,
) -> Comparison:
    """Compare clips with a reference.

    Args:
        reference: the clip that counts as the truth.
        outputs: one or more clips of the same size. A longer clip is compared up to the end
            of the shortest.
        sheet: where to write a PNG with crops at the places of the largest differences, one row a
            place: the reference, then the outputs in the order given.
        max_frames: compare no more than so many frames.
        vmaf: compute VMAF-NEG where the library has it.

    Raises:
        InputError: no outputs, or a clip of another size than the reference.
        MediaError: a clip cannot be decoded or holds no frame.
        OutputError: the contact sheet cannot be written.
    """
    if not outputs:
        raise InputError("got no clips to compare, expected at least one beside the reference")
    names = [str(reference), *map(str, outputs)]
    tallies = [_Tally(name) for name in names[1:]]
    finder = _Finder(PLACES) if sheet is not None else None
    size: tuple[int, int] | None = None
    with tempfile.TemporaryDirectory() as folder:
        meters: list[_VmafMeter] = []
        streams = [_frames(name) for name in names]
        for number, group in enumerate(zip(*streams, strict=False)):
            if max_frames is not None and number >= max_frames:
                break
            if size is None:
                size = _one_size(names, group)
                if vmaf and has_vmaf():
                    logs = [Path(folder) / f"{i}.json" for i in range(len(outputs))]
                    meters = [_VmafMeter(*size, log) for log in logs]
            planes = [_luma(frame) for frame in group]
            for tally, plane in zip(tallies, planes[1:], strict=True):
                tally.add(planes[0], plane)
            for meter, plane in zip(meters, planes[1:], strict=False):
                meter.add(planes[0], plane)
            if finder is not None:
                finder.look(number, group, planes)
        if size is None:
            raise MediaError(f"got no common frame in {', '.join(names)}, expected at least one")
        vmafs: list[float | None] = [meter.close() for meter in meters]
    vmafs += [None] * (len(tallies) - len(vmafs))
    places: tuple[Place, ...] = ()
    if finder is not None and sheet is not None:
        places = finder.write(Path(sheet))
    return Comparison(
        reference=names[0],
        width=size[0],
        height=size[1],
        scores=tuple(t.score(v) for t, v in zip(tallies, vmafs, strict=True)),
        places=places,
    )


def write_png(path: Path, picture: Rgb) -> None:
    """Write an RGB picture, uint8 (H, W, 3), full range, through FFmpeg's PNG encoder.

    Raises:
        OutputError: the file cannot be written.
    """
    av = _av()
    context = av.CodecContext.create("png", "w")
    context.height, context.width = picture.shape[:2]
    context.pix_fmt = "rgb24"
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    packets = [*context.encode(frame), *context.encode(None)]
    try:
        path.write_bytes(b"".join(bytes(packet) for packet in packets))
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


@dataclass(slots=True)
class _Tally:
    """Running sums of one clip's figures."""

    name: str
    psnrs: list[float] = field(default_factory=list)
    ssims: list[float] = field(default_factory=list)
    flickers: list[float] = field(default_factory=list)
    before: tuple[Luma, Luma] | None = None

    def add(self, reference: Luma, picture: Luma) -> None:
        self.psnrs.append(psnr(reference, picture))
        self.ssims.append(ssim(reference, picture))
        if self.before is not None:
            change = (picture - self.before[1]) - (reference - self.before[0])
            self.flickers.append(float(np.abs(change).mean()))
        self.before = (reference, picture)

    def score(self, vmaf: float | None) -> Score:
        return Score(
            name=self.name,
            frames=len(self.psnrs),
            psnr_db=float(np.mean(self.psnrs)),
            ssim=float(np.mean(self.ssims)),
            vmaf_neg=vmaf,
            flicker=float(np.mean(self.flickers)) if self.flickers else 0.0,
        )


class VmafMeter:
    """Mean VMAF-NEG of pairs of luma planes, of any sizes in turn."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._meters: dict[tuple[int, ...], _VmafMeter] = {}
        self._counts: dict[tuple[int, ...], int] = {}

    def add(self, reference: Luma, picture: Luma) -> None:
        """Take a pair, float32 (H, W), limited-range codes 0..255."""
        size = reference.shape
        if size not in self._meters:
            log = Path(self._folder.name) / f"{len(self._meters)}.json"
            self._meters[size] = _VmafMeter(size[1], size[0], log)
        self._counts[size] = self._counts.get(size, 0) + 1
        self._meters[size].add(reference, picture)

    def result(self) -> float | None:
        """Return the mean over all pairs, or None without pairs. Ends the measurement."""
        if not self._counts:
            return None
        total = sum(meter.close() * self._counts[size] for size, meter in self._meters.items())
        self._meters.clear()
        self._folder.cleanup()
        return total / sum(self._counts.values())


class _VmafMeter:
    """One libvmaf filter, fed pair by pair; it writes its log when the graph goes."""

    def __init__(self, width: int, height: int, log: Path) -> None:
        av = _av()
        self._log = log
        self._count = 0
        graph = av.filter.Graph()
        self._width, self._height = width // 2 * 2, height // 2 * 2
        self._inputs = [
            graph.add_buffer(
                width=self._width,
                height=self._height,
                format="yuv420p",
                name=name,
                time_base=Fraction(1, 25),
            )
            for name in ("picture", "reference")
        ]
        # Colons separate options in FFmpeg's syntax.
        place = log.as_posix().replace(":", "\\:")
        vmaf = graph.add("libvmaf", f"model={VMAF_MODEL}:log_fmt=json:log_path={place}")
        sink = graph.add("buffersink")
        for number, buffer in enumerate(self._inputs):
            buffer.link_to(vmaf, 0, number)
        vmaf.link_to(sink)
        graph.configure()
        self._graph: Any = graph
        self._sink: Any = sink

    def add(self, reference: Luma, picture: Luma) -> None:
        av = _av()
        for buffer, plane in zip(self._inputs, (picture, reference), strict=True):
            codes = np.full((self._height * 3 // 2, self._width), 128, np.uint8)
            codes[: self._height] = np.rint(plane[: self._height, : self._width])
            frame = av.VideoFrame.from_ndarray(codes, format="yuv420p")
            frame.pts, frame.time_base = self._count, Fraction(1, 25)
            buffer.push(frame)
        self._count += 1
        self._drain()

    def _drain(self) -> None:
        av = _av()
        while True:
            try:
                self._sink.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    def close(self) -> float:
        """End the stream and read the mean score."""
        while self._inputs:
            self._inputs.pop().push(None)
        self._drain()
        self._sink = self._graph = None
        gc.collect()
        report = json.loads(self._log.read_text())
        return float(report["pooled_metrics"]["vmaf"]["mean"])


class _Finder:
    """Keeps the crops where the clips are farthest from the reference, one a frame."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, int, Place, list[Rgb]]] = []

    def look(self, number: int, frames: Sequence[Any], planes: Sequence[Luma]) -> None:
        height, width = planes[0].shape
        crop = min(CROP, height, width)
        step = max(1, crop // 2)
        errors = np.max([np.abs(p - planes[0]) for p in planes[1:]], axis=0)
        table = np.zeros((height + 1, width + 1))
        table[1:, 1:] = errors.cumsum(0, dtype=np.float64).cumsum(1)
        ys, xs = np.arange(0, height - crop + 1, step), np.arange(0, width - crop + 1, step)
        low, right = ys[:, None] + crop, xs[None] + crop
        sums = table[low, right] - table[ys[:, None], right] - table[low, xs[None]]
        sums = (sums + table[ys[:, None], xs[None]]) / crop**2
        # Neighbouring frames show the same thing: near a kept frame only a larger error counts.
        row, column = divmod(int(sums.argmax()), sums.shape[1])
        error, x, y = float(sums[row, column]), int(xs[column]), int(ys[row])
        near = [e for e in self._heap if abs(e[2].frame - number) < 12]
        if near:
            weakest = min(near)
            if error <= weakest[0]:
                return
            self._heap = [e for e in self._heap if e not in near]
            heapq.heapify(self._heap)
        elif len(self._heap) >= self._count and error <= self._heap[0][0]:
            return
        crops = [f.to_ndarray(format="rgb24")[y : y + crop, x : x + crop].copy() for f in frames]
        place = Place(frame=number, x=x, y=y, error=error)
        heapq.heappush(self._heap, (error, number, place, crops))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    def write(self, path: Path) -> tuple[Place, ...]:
        """Write the sheet, the largest difference first."""
        ranked = sorted(self._heap, reverse=True)
        crop = ranked[0][3][0].shape[0]
        columns = len(ranked[0][3])
        pitch = crop + _GAP
        sheet = np.full((len(ranked) * pitch - _GAP, columns * pitch - _GAP, 3), 24, np.uint8)
        for i, (_, _, _, crops) in enumerate(ranked):
            for j, picture in enumerate(crops):
                sheet[i * pitch : i * pitch + crop, j * pitch : j * pitch + crop] = picture
        write_png(path, sheet)
        return tuple(entry[2] for entry in ranked)


def _av() -> ModuleType:
    return importlib.import_module("av")


def _frames(name: str) -> Iterator[Any]:
    """All frames of the first video stream, as the decoder gives them."""
    av = _av()
    try:
        with av.open(name) as container:
            if not container.streams.video:
                raise MediaError(f"{name}: got a file without pictures, expected a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{name}: cannot be read as video: {error}") from error


def _one_size(names: Sequence[str], group: Sequence[Any]) -> tuple[int, int]:
    """The (width, height) that all clips share."""
    size = (group[0].width, group[0].height)
    for name, frame in zip(names, group, strict=True):
        if (frame.width, frame.height) != size:
            raise InputError(
                f"{name}: got {frame.width}x{frame.height}, "
                f"expected {size[0]}x{size[1]} as in {names[0]}",
                hint="Compare clips of one size",
            )
    return size


def _luma(frame: Any) -> Luma:
    """The Y plane, float32 (H, W): limited-range codes on the 8-bit scale, in quarters if deep."""
    deep = any(part.bits > 8 for part in frame.format.components)
    full = frame.format.name.startswith("yuvj") or int(frame.color_range) == _FULL_RANGE
    wanted = "yuv420p10le" if deep else "yuv420p"
    if full:
        frame = frame.reformat(format=wanted, src_color_range="JPEG", dst_color_range="MPEG")
    elif frame.format.name != wanted:
        frame = frame.reformat(format=wanted)
    plane = frame.planes[0]
    kind = np.uint16 if deep else np.uint8
    pitch = plane.line_size // np.dtype(kind).itemsize
    values = np.frombuffer(plane, kind).reshape(-1, pitch)[: frame.height, : frame.width]
    codes = values.astype(np.float32)
    return codes * np.float32(0.25) if deep else codes
