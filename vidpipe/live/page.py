"""Pictures for the browser page: JPEG, before and after, only while somebody looks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.video.reformatter import Interpolation, VideoReformatter

from vidpipe.device import CPU, import_cupy, setup_lock
from vidpipe.errors import InputError
from vidpipe.frame import Array, Frame, FrameSpec, Matrix, Range
from vidpipe.live.outputs import LiveSink
from vidpipe.media.convert import frame_from
from vidpipe.stage import register


@dataclass(frozen=True, slots=True)
class Picture:
    """What the page shows.

    Attributes:
        number: counts up.
        captured_s: the pipeline's clock when the frame was captured.
        before, after: JPEG files.
    """

    number: int
    captured_s: float
    before: bytes
    after: bytes


@register("page")
class Page(LiveSink):
    """Makes the pictures that the page of `vidpipe live --page` shows.

    Args:
        width: the most pixels in a row; larger pictures are scaled down.
        quality: of the JPEG files, 2 (best) to 31.
    """

    capacity = 1
    in_budget = False

    def __init__(self, *, width: int = 1280, quality: int = 5) -> None:
        super().__init__()
        if not 2 <= quality <= 31 or width < 64:
            raise InputError(
                f"width {width} and quality {quality}",
                hint="Expected a width of 64 or more and a quality from 2 to 31",
            )
        self.width = width
        self.quality = quality
        self._viewers: list[Callable[[Picture], None]] = []
        self._lock = threading.Lock()
        self._encoders: dict[str, _Encoder] = {}
        self._number = 0

    def watch(self, viewer: Callable[[Picture], None]) -> Callable[[], None]:
        """Call `viewer` with every picture, on this sink's thread; it must not wait.

        Returns:
            What ends it.
        """
        with self._lock:
            self._viewers.append(viewer)

        def leave() -> None:
            with self._lock:
                if viewer in self._viewers:
                    self._viewers.remove(viewer)

        return leave

    def deliver(self, frame: Frame) -> str | None:
        """Encode the frame, and the one before the model, if anybody looks."""
        with self._lock:
            viewers = list(self._viewers)
        if not viewers:
            self.state = "unwatched"
            return ""
        after = self._jpeg("after", frame)
        before = getattr(frame, "before", None)
        self._number += 1
        picture = Picture(
            self._number,
            frame.captured_s,
            after if before is None else self._jpeg("before", before),
            after,
        )
        for viewer in viewers:
            viewer(picture)
        return None

    def replan(self, spec: FrameSpec) -> None:
        """Take the new size."""
        self._spec = None
        self.plan(spec)

    def _jpeg(self, which: str, frame: Frame) -> bytes:
        width, height = fit(frame.spec, self.width)
        encoder = self._encoders.get(which)
        if encoder is None or encoder.size != (width, height):
            encoder = self._encoders[which] = _Encoder("mjpeg", width, height, self.quality)
        return encoder(frame)


def fit(spec: FrameSpec, width: int) -> tuple[int, int]:
    """Return even (width, height) of a picture scaled down to at most so many pixels a row."""
    if spec.width <= width:
        return spec.width, spec.height
    return width & ~1, max(2, round(spec.height * width / spec.width) & ~1)


def png(frame: Frame) -> bytes:
    """Return a frame as a PNG file, 8 bits of R, G and B."""
    return _Encoder("png", frame.spec.width, frame.spec.height, 0)(frame)


def on_host(frame: Frame) -> tuple[Array, ...]:
    """Return a frame's planes as NumPy arrays; from a GPU by a copy, which is waited for."""
    if frame.spec.device == CPU:
        return frame.planes
    with setup_lock:
        import_cupy(frame.spec.device)
        frame.synchronize()
        return tuple(plane.get() for plane in frame.planes)


class _Encoder:
    """Turns frames into single pictures of one size."""

    def __init__(self, codec: str, width: int, height: int, quality: int) -> None:
        self.size = (width, height)
        self._format = "yuvj420p" if codec == "mjpeg" else "rgb24"
        self._reformatter = VideoReformatter()
        context: Any = av.CodecContext.create(codec, "w")
        context.width, context.height = width, height
        context.pix_fmt = self._format
        context.time_base = Fraction(1, 1000)
        if codec == "mjpeg":
            context.color_range = 2
            context.qmin = context.qmax = quality
            context.thread_count = 1
        self._context = context
        self._count = 0

    def __call__(self, frame: Frame) -> bytes:
        color = frame.spec.resolved_color()
        picture = self._reformatter.reformat(
            frame_from(on_host(frame), frame.spec.format),
            *self.size,
            self._format,
            src_colorspace=1 if color.matrix == Matrix.BT709 else 5,
            dst_colorspace=5,  # JPEG is BT.601 in full range
            src_color_range=2 if color.range == Range.FULL else 1,
            dst_color_range=2,
            interpolation=Interpolation.BILINEAR,
        )
        self._count += 1
        picture.pts = self._count
        picture.time_base = Fraction(1, 1000)
        picture.pict_type = 0
        packets = self._context.encode(picture)
        return b"".join(bytes(p) for p in packets)
