"""A live source through PyAV: connect, read, decode, and tell the time of all of it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import av.container
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter

from vidpipe.clock import Clock
from vidpipe.errors import MediaError
from vidpipe.frame import PIXEL_FORMATS, Color, Frame, FrameSpec, Matrix, Range
from vidpipe.live.address import AGAIN, Address, without_secrets
from vidpipe.live.audio import RATE, Chunk
from vidpipe.media.convert import Converter, planes_of
from vidpipe.media.probe import color_of

TIME_BASE = Fraction(1, 90000)
"""Of all live pictures."""

FAILURES = (OSError, ValueError, av.error.FFmpegError)
"""What PyAV raises when a source or an output cannot be used."""

_LOW_DELAY = 1 << 19  # AV_CODEC_FLAG_LOW_DELAY
_JUMP_S = 0.5
_SOUND_AHEAD_S = 0.25


class Timeline:
    """Maps a source's timestamps to seconds since the pipeline's start.

    The first packet of a connection is now. From there the source's own clock counts, which
    is smoother than arrival. What comes ahead of it, as the backlog of a new connection does,
    shows that the clock lies too late: then that packet is now. When packets lag behind it by
    more than half a second, the source has jumped, and now is now again. Sound and picture
    share one timeline.

    Args:
        clock: the pipeline's clock.
        start_s: its time at second 0.
    """

    def __init__(self, clock: Clock, start_s: float) -> None:
        self._clock = clock
        self._start_s = start_s
        self._offset_s: float | None = None

    def map(self, source_s: float) -> float:
        """Return the time of what has just come with a timestamp of its source."""
        now_s = self._clock.now_s() - self._start_s
        fresh_s = now_s - source_s
        if self._offset_s is None or not 0 <= fresh_s - self._offset_s <= _JUMP_S:
            self._offset_s = fresh_s
        return source_s + self._offset_s

    def peek(self, source_s: float) -> float:
        """Return the time of something decoded later than it came."""
        return source_s + (self._offset_s or 0.0)


class Connection:
    """One open source, until it ends or is lost.

    Args:
        address: where it is.
        clock: the pipeline's clock.
        timeline: shared by all that this connection gives.
        options: more options for FFmpeg; they win over the address's.
        timeout_s: no packet for so long means that the source is lost.
        sound: where decoded sound goes, or None.
        threads: of the video decoder.
        known: what the source's pictures were before it was lost; shortens the look at it.
        stop: ends the waiting for a file's pace.

    Raises:
        MediaError: it cannot be opened; one line says why.
    """

    def __init__(
        self,
        address: Address,
        clock: Clock,
        timeline: Timeline,
        *,
        options: dict[str, str] | None = None,
        timeout_s: float = 5.0,
        sound: Callable[[Chunk], None] | None = None,
        threads: int = 0,
        stop: threading.Event | None = None,
        known: FrameSpec | None = None,
    ) -> None:
        self.address = address
        self._known = known
        self._clock = clock
        self._timeline = timeline
        self._sound = sound
        self._stop = stop or threading.Event()
        url = f"file:{address.url}" if address.kind == "file" else address.url
        again = AGAIN if known is not None and address.kind == "network" else {}
        try:
            self._container: av.container.InputContainer = av.open(
                url,
                format=address.format,
                container_options={**address.options, **again, **(options or {})},
                timeout=(timeout_s, timeout_s) if address.kind == "network" else None,
            )
        except FAILURES as error:
            raise source_error(address, error) from None
        try:
            self._prepare(threads)
        except BaseException:
            self._container.close()
            raise

    def _prepare(self, threads: int) -> None:
        videos = self._container.streams.video
        if not videos:
            raise MediaError(f"source '{without_secrets(self.address.url)}' has no picture")
        self._video = videos[0]
        context = self._video.codec_context
        # Frame threads hold back one frame each.
        context.thread_type = "SLICE"
        context.thread_count = threads
        context.flags |= _LOW_DELAY
        audios = self._container.streams.audio if self._sound is not None else ()
        self._audio = audios[0] if audios else None
        self._resampler = av.AudioResampler("fltp", "stereo", RATE)
        self._pictures = Pictures(self._video, self._known)

    @property
    def has_sound(self) -> bool:
        """Whether there is sound, and somebody wants it."""
        return self._audio is not None

    def frames(self) -> Iterator[Frame]:
        """Yield pictures as they come, and hand on the sound that lies between them.

        Raises:
            MediaError: the source is lost.
        """
        streams = [s for s in (self._video, self._audio) if s is not None]
        begin, end_s = self._container.start_time, 0.0
        pace = None
        if not self.address.paced:
            pace = _Pace(self._clock, self._stop, None if begin is None else begin / av.time_base)
            self._timeline.map(0.0 if begin is None else begin / av.time_base)
        try:
            for packet in self._container.demux(streams):
                if self._stop.is_set():
                    return
                stamp = packet.dts
                if stamp is None and pace is None:
                    stamp = packet.pts
                if stamp is not None:
                    source_s = float(stamp * packet.time_base)
                    if pace is not None and packet.stream is not self._video:
                        # Pictures that the decoder holds until the end must not wait for it.
                        pace.wait(source_s - _SOUND_AHEAD_S)
                    else:
                        if pace is not None:
                            pace.wait(source_s)
                        self._timeline.map(source_s)
                now_s = self._clock.now_s()
                if packet.stream is not self._video:
                    self._hear(packet)
                    continue
                for picture in _decoded(packet):
                    # A picture that waits for others, as B-frames make it, comes with the last.
                    if pace is not None and picture.time is not None:
                        pace.wait(float(picture.time))
                        now_s = self._clock.now_s()
                        end_s = float(picture.time + 1 / (self._video.average_rate or 25))
                    yield self._frame(picture, now_s)
        except FAILURES as error:
            raise source_error(self.address, error) from None
        if pace is not None:
            pace.wait(end_s)  # the last picture has its time too, before a file begins anew

    def _frame(self, picture: av.VideoFrame, captured_s: float) -> Frame:
        time_s = None
        if picture.pts is not None and picture.time_base is not None:
            time_s = self._timeline.peek(float(picture.pts * picture.time_base))
        frame = self._pictures.frame(picture)
        frame.pts = -1 if time_s is None else round(time_s / TIME_BASE)
        frame.captured_s = captured_s
        return frame

    def _hear(self, packet: Any) -> None:
        assert self._sound is not None
        for heard in _decoded(packet):
            if heard.pts is None or heard.time_base is None:
                continue
            time_s = self._timeline.peek(float(heard.pts * heard.time_base))
            for piece in self._resampler.resample(heard):
                self._sound(Chunk(time_s, piece.to_ndarray().astype(np.float32, copy=False)))

    def close(self) -> None:
        """Hang up."""
        self._container.close()


def _decoded(packet: Any) -> list[Any]:
    """Return what a packet decodes to; a damaged one decodes to nothing."""
    try:
        return list(packet.decode())
    except av.error.FFmpegError:
        return []


class _Pace:
    """Lets a file's packets and pictures through in their own time.

    Args:
        clock: tells the time.
        stop: ends the waiting.
        begin_s: what of the file is due now; the first that comes, if not known.
    """

    def __init__(self, clock: Clock, stop: threading.Event, begin_s: float | None) -> None:
        self._clock = clock
        self._stop = stop
        self._offset_s = None if begin_s is None else clock.now_s() - begin_s

    def wait(self, source_s: float) -> None:
        now_s = self._clock.now_s()
        if self._offset_s is None:
            self._offset_s = now_s - source_s
        late_s = now_s - (source_s + self._offset_s)
        if late_s < 0:
            self._stop.wait(-late_s)
        elif late_s > 1:  # the machine slept; do not race after it
            self._offset_s += late_s


class Pictures:
    """Turns decoded pictures into frames of yuv420p or NV12, 8 bits.

    Live sinks take nothing else, so other formats are converted once, at the entrance.

    Args:
        stream: where the pictures come from; tells their rate.
        known: what they were on the last connection; equal ones keep its rate, so that an
            estimate that comes out a little different does not plan every model anew.
    """

    def __init__(self, stream: Any = None, known: FrameSpec | None = None) -> None:
        self._stream = stream
        self._known = known
        self._key: tuple[Any, ...] = ()
        self._spec: FrameSpec | None = None
        self._converter: Converter | None = None
        self._from_rgb = VideoReformatter()

    def frame(self, picture: av.VideoFrame) -> Frame:
        """Return a frame at pts 0; its spec is the last one's unless the picture changed."""
        name = picture.format.name
        color = color_of(picture, self._stream)
        key = (picture.width, picture.height, name, color)
        if key != self._key or self._spec is None:
            self._key = key
            self._spec = self._plan(picture, color)
        spec = self._spec
        if name.startswith("yuvj420p"):
            name = "yuv420p"
        if name != spec.format.name:
            picture = self._convert(picture, color)
        return Frame(planes_of(picture, spec.format), spec, 0)

    def _plan(self, picture: av.VideoFrame, color: Color) -> FrameSpec:
        name = "nv12" if picture.format.name == "nv12" else "yuv420p"
        if picture.format.is_rgb or picture.format.name == "pal8":
            color = replace(
                Color().resolved(picture.width, picture.height), range=int(Range.LIMITED)
            )
        found = None if self._stream is None else self._stream.average_rate
        rate = Fraction(found) if found is not None and 0 < found <= 1000 else None
        spec = FrameSpec(
            width=picture.width,
            height=picture.height,
            format=PIXEL_FORMATS[name],
            color=color,
            time_base=TIME_BASE,
            rate=rate,
        )
        known = self._known
        if known is not None and replace(spec, rate=known.rate) == known:
            return known
        return spec

    def _convert(self, picture: av.VideoFrame, color: Color) -> av.VideoFrame:
        assert self._spec is not None
        spec = self._spec
        if picture.format.is_rgb or picture.format.name == "pal8":
            return self._from_rgb.reformat(
                picture,
                spec.width,
                spec.height,
                "yuv420p",
                dst_colorspace=1 if spec.color.matrix == Matrix.BT709 else 5,
                src_color_range=2,
                dst_color_range=1,
            )
        if self._converter is None or self._converter.width != spec.width:
            self._converter = Converter(spec.width, spec.height, "yuv420p", "bilinear", threads=1)
        return self._converter(picture, color.resolved(spec.width, spec.height))


def slate(spec: FrameSpec) -> Frame:
    """Return the picture for a source that has not given one: dark, with a bright frame."""
    planes = []
    shapes = spec.plane_shapes()
    for number, shape in enumerate(shapes):
        value = 40 if number == 0 else 128
        plane = np.full(shape, value << (spec.format.bits - 8 + spec.format.shift))
        planes.append(plane.astype(spec.format.dtype))
    edge = max(2, min(spec.width, spec.height) // 60)
    inner = planes[0][edge:-edge, edge:-edge].copy()
    planes[0][...] = 180 << (spec.format.bits - 8 + spec.format.shift)
    planes[0][edge:-edge, edge:-edge] = inner
    return Frame(tuple(planes), spec, 0)


def source_error(address: Address, error: Exception) -> MediaError:
    """Say in one line why a source cannot be read."""
    number = getattr(error, "errno", None)
    name = without_secrets(address.url)
    what = getattr(error, "strerror", None) or str(error)
    if address.kind == "camera":
        if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return MediaError(f"there is no camera '{name}'", hint="Is it plugged in?")
        if number == errno.EBUSY:
            return MediaError(
                f"camera '{name}' is busy", hint="Close the program that uses it, then try again"
            )
        if number == errno.EACCES:
            return MediaError(
                f"no permission to use camera '{name}'", hint="Join the group 'video'"
            )
        return MediaError(f"camera '{name}' cannot be used: {what}")
    if isinstance(error, av.error.ExitError):  # how a timeout shows
        return MediaError(f"source '{name}' did not answer in time")
    if isinstance(error, av.error.EOFError):
        return MediaError(f"source '{name}' ended")
    return MediaError(f"source '{name}' cannot be read: {what}", hint=_hint(address, number))


def _hint(address: Address, number: int | None) -> str | None:
    if number == errno.ECONNREFUSED:
        return "Is the server running?"
    if number in (errno.EIO, errno.EINVAL) and address.kind == "network":
        return "Check host, port and path"
    return None
