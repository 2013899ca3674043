"""What flows between stages: frames, and the description of a stream of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from vidpipe.device import CPU, Device, Event, Slot, Stream
from vidpipe.errors import SpecError, did_you_mean

Array: TypeAlias = Any
"""A plane: `numpy.ndarray` on the CPU, `cupy.ndarray` on a GPU."""


class Matrix(IntEnum):
    """Matrix coefficients, ITU-T H.273 table 4; the same numbers as FFmpeg's."""

    RGB = 0
    BT709 = 1
    UNSPECIFIED = 2
    FCC = 4
    BT470BG = 5
    SMPTE170M = 6
    SMPTE240M = 7
    YCGCO = 8
    BT2020_NCL = 9
    BT2020_CL = 10


LUMA_COEFFICIENTS: dict[int, tuple[float, float]] = {
    Matrix.BT709: (0.2126, 0.0722),
    Matrix.FCC: (0.30, 0.11),
    Matrix.BT470BG: (0.299, 0.114),
    Matrix.SMPTE170M: (0.299, 0.114),
    Matrix.SMPTE240M: (0.212, 0.087),
    Matrix.BT2020_NCL: (0.2627, 0.0593),
    Matrix.BT2020_CL: (0.2627, 0.0593),
}
"""(K_R, K_B) of each matrix, ITU-T H.273 table 4."""


class Range(IntEnum):
    """Code range; the same numbers as FFmpeg's."""

    UNSPECIFIED = 0
    LIMITED = 1
    FULL = 2


class ChromaSite(IntEnum):
    """Where chroma samples sit; the same numbers as FFmpeg's."""

    UNSPECIFIED = 0
    LEFT = 1
    CENTER = 2
    TOPLEFT = 3
    TOP = 4
    BOTTOMLEFT = 5
    BOTTOM = 6

    def offset(self) -> tuple[float, float]:
        """Return (x, y) of a chroma sample inside its group of luma samples, 0..1.

        0 is on the first luma sample of the group, 0.5 in the middle, 1 on the last.
        Unspecified counts as left, the default of H.264 and HEVC.
        """
        return _SITE_OFFSETS[self]


_SITE_OFFSETS = {
    ChromaSite.UNSPECIFIED: (0.0, 0.5),
    ChromaSite.LEFT: (0.0, 0.5),
    ChromaSite.CENTER: (0.5, 0.5),
    ChromaSite.TOPLEFT: (0.0, 0.0),
    ChromaSite.TOP: (0.5, 0.0),
    ChromaSite.BOTTOMLEFT: (0.0, 1.0),
    ChromaSite.BOTTOM: (0.5, 1.0),
}


@dataclass(frozen=True, slots=True)
class Color:
    """Colour tags of a stream, kept as they were found; "unspecified" stays unspecified.

    Attributes:
        matrix: matrix coefficients, H.273 numbers.
        transfer: transfer characteristics, H.273 numbers (2: unspecified).
        primaries: colour primaries, H.273 numbers (2: unspecified).
        range: limited or full code range.
        site: position of the chroma samples.
    """

    matrix: int = Matrix.UNSPECIFIED
    transfer: int = 2
    primaries: int = 2
    range: int = Range.UNSPECIFIED
    site: int = ChromaSite.UNSPECIFIED

    def resolved(self, width: int, height: int) -> Color:
        """Return the colour to compute with: unspecified matrix and range are filled in.

        An unspecified matrix is BT.601 for pictures up to 1024x576 and BT.709 above, the
        convention of players; an unspecified range is limited.
        """
        matrix = self.matrix
        if matrix == Matrix.UNSPECIFIED:
            small = width <= 1024 and height <= 576
            matrix = Matrix.SMPTE170M if small else Matrix.BT709
        return replace(
            self,
            matrix=matrix,
            range=self.range or Range.LIMITED,
            site=self.site or ChromaSite.LEFT,
        )

    def luma_coefficients(self) -> tuple[float, float]:
        """Return (K_R, K_B) of a resolved colour.

        Raises:
            SpecError: the matrix is not one of R'G'B' to Y'CbCr by such coefficients.
        """
        if self.matrix not in LUMA_COEFFICIENTS:
            raise SpecError(f"matrix coefficients {self.matrix} have no K_R and K_B")
        return LUMA_COEFFICIENTS[self.matrix]


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How samples lie in memory.

    Attributes:
        name: FFmpeg's name.
        model: "yuv", "gray" or "rgb" (planes G, B, R as in FFmpeg's gbrp).
        bits: significant bits of a sample; more than 8 are stored in uint16.
        subsampling: base-2 logarithm of the chroma subsampling, (horizontal, vertical).
        interleaved: chroma in one plane of shape (h, w, 2), as in NV12.
        shift: unused low bits of a 16-bit sample (6 in P010).
    """

    name: str
    model: str
    bits: int
    subsampling: tuple[int, int] = (0, 0)
    interleaved: bool = False
    shift: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of every plane: uint8 or uint16, little endian."""
        return np.dtype(np.uint8 if self.bits == 8 else np.uint16)

    def chroma_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of a chroma plane, rounded up for odd sizes."""
        x, y = self.subsampling
        return -(-width >> x), -(-height >> y)

    def plane_shapes(self, width: int, height: int) -> tuple[tuple[int, ...], ...]:
        """Return the NumPy shape of each plane, (h, w) or (h, w, 2), in elements."""
        if self.model == "gray":
            return ((height, width),)
        w, h = self.chroma_size(width, height)
        if self.interleaved:
            return ((height, width), (h, w, 2))
        return ((height, width), (h, w), (h, w))

    def __str__(self) -> str:
        return self.name


def _pixel_formats() -> dict[str, PixelFormat]:
    formats = [
        PixelFormat("nv12", "yuv", 8, (1, 1), True),
        PixelFormat("nv16", "yuv", 8, (1, 0), True),
        PixelFormat("p010le", "yuv", 10, (1, 1), True, 6),
        PixelFormat("p210le", "yuv", 10, (1, 0), True, 6),
        PixelFormat("p016le", "yuv", 16, (1, 1), True),
    ]
    for bits, suffix in ((8, ""), (10, "10le"), (12, "12le"), (16, "16le")):
        formats.append(PixelFormat(f"gray{suffix}", "gray", bits))
        formats.append(PixelFormat(f"gbrp{suffix}", "rgb", bits))
        for name, subsampling in (("420", (1, 1)), ("422", (1, 0)), ("444", (0, 0))):
            formats.append(PixelFormat(f"yuv{name}p{suffix}", "yuv", bits, subsampling))
    return {f.name: f for f in formats}


PIXEL_FORMATS = _pixel_formats()
"""Every format that a link can carry, by FFmpeg's name."""


def pixel_format(name: str) -> PixelFormat:
    """Return the format of that name.

    Raises:
        SpecError: the name is not one of `PIXEL_FORMATS`.
    """
    try:
        return PIXEL_FORMATS[name]
    except KeyError:
        raise SpecError(
            f"pixel format '{name}' is not supported", hint=did_you_mean(name, [*PIXEL_FORMATS])
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSpec:
    """What flows on a link; the same object is shared by all its frames.

    Attributes:
        width, height: pixels of the luma plane, at least 1.
        format: planes, shapes, dtype.
        color: colour tags as found in the source.
        time_base: seconds per tick of `Frame.pts`.
        rate: nominal frames per second, or None where it varies or is not known.
        device: where the planes live.
    """

    width: int
    height: int
    format: PixelFormat
    color: Color = field(default_factory=Color)
    time_base: Fraction = Fraction(1, 90000)
    rate: Fraction | None = None
    device: Device = CPU

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise SpecError(f"frame size {self.width}x{self.height} is not positive")

    def plane_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the NumPy shape of each plane."""
        return self.format.plane_shapes(self.width, self.height)

    def resolved_color(self) -> Color:
        """Return the colour to compute with (see `Color.resolved`)."""
        color = self.color.resolved(self.width, self.height)
        if self.format.model == "rgb" and self.color.range == Range.UNSPECIFIED:
            return replace(color, range=Range.FULL)
        return color

    def __str__(self) -> str:
        rate = f"{float(self.rate):.5g} fps" if self.rate else "variable rate"
        return f"{self.width}x{self.height} {self.format} {rate} on {self.device}"


@dataclass(slots=True)
class Frame:
    """One picture.

    Attributes:
        planes: arrays on `spec.device`, of `spec.plane_shapes()` and `spec.format.dtype`.
            Rows may be further apart than the width. A stage never writes into the planes
            of a frame that it was given: other branches read them too.
        spec: shared, never copied.
        pts: presentation time in ticks of `spec.time_base`, strictly rising on a link.
        duration: ticks, or None.
        captured_s: the pipeline's clock when the frame entered, for latency.
        side_data: per-frame side data of the decoder (captions, HDR10+), opaque; passed on.
        ready: event after which the planes may be read, or None when they already may.
        slot: ring slot that holds the planes, or None.
    """

    planes: tuple[Array, ...]
    spec: FrameSpec
    pts: int
    duration: int | None = None
    captured_s: float = 0.0
    side_data: object | None = None
    ready: Event | None = None
    slot: Slot | None = None

    @property
    def time_s(self) -> float:
        """Presentation time in seconds."""
        ticks, per_second = self.spec.time_base.as_integer_ratio()
        return self.pts * ticks / per_second

    def replace(
        self,
        planes: Sequence[Array],
        spec: FrameSpec,
        *,
        slot: Slot | None = None,
        ready: Event | None = None,
    ) -> Frame:
        """Return a frame with the same time and side data and another picture."""
        return Frame(
            tuple(planes),
            spec,
            self.pts,
            self.duration,
            self.captured_s,
            self.side_data,
            ready,
            slot,
        )

    def wait(self, stream: Stream) -> None:
        """Make later work of `stream` wait until the planes may be read."""
        if self.ready is not None:
            stream.wait_event(self.ready)

    def synchronize(self) -> None:
        """Block the calling thread until the planes may be read."""
        event = self.ready  # another reader's thread may take it off
        if event is not None:
            event.synchronize()

    def read_by(self, stream: Stream, event: Event | None = None) -> None:
        """Say that the work queued on `stream` so far reads the planes.

        Args:
            stream: of the work.
            event: recorded behind it already; one is recorded now if not given.
        """
        if self.slot is not None:
            self.slot.readers.append(event or stream.record())
