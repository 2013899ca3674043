"""Frames out of a media file."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import av.stream
import av.video.stream

from vidpipe.device import CPU, Device
from vidpipe.errors import MediaError
from vidpipe.frame import PIXEL_FORMATS, Color, Frame, FrameSpec, PixelFormat, Range
from vidpipe.media import nvdec
from vidpipe.media.convert import Converter, nearest_format, planes_of
from vidpipe.media.deinterlace import Deinterlacer
from vidpipe.media.probe import (
    MediaInfo,
    color_of,
    open_input,
    pick_video,
    probe_first_frame,
    seek,
)
from vidpipe.stage import Source

# bwdif needs a neighbourhood; smaller pictures are passed on as they are.
_BWDIF_MIN = (3, 4)


class Decode(Source):
    """Reads the pictures of a media file, every one, with its own timestamp.

    On a GPU, NVDEC decodes to device planes, NV12 or P010. What NVDEC cannot decode, and
    pictures to deinterlace, are decoded by the CPU and uploaded; the report says which.

    Args:
        path: the file.
        start_s: skip what comes before, in seconds from the start of the file.
        duration_s: stop after so many seconds.
        deinterlace: "auto" (the frames that are flagged interlaced), "always" or "never".
        threads: of the decoder; 0 means as many as the machine has.
        stream: index of the video stream; by default the best one.
        drop: what may be lost on the way in; only "alpha" means something here.
        device: where the frames go, "cpu", "cuda" or "cuda:N"; "auto" is the CPU.
    """

    bundles = True

    def __init__(
        self,
        *,
        path: str,
        start_s: float = 0.0,
        duration_s: float | None = None,
        deinterlace: str = "auto",
        threads: int = 0,
        stream: int | None = None,
        drop: list[str] | None = None,
        device: str = "auto",
    ) -> None:
        if deinterlace not in ("auto", "always", "never"):
            raise MediaError(
                f"deinterlace is '{deinterlace}'", hint="Expected auto, always or never"
            )
        if start_s < 0 or (duration_s is not None and duration_s <= 0):
            raise MediaError(
                f"start {start_s:g} s and duration {duration_s} s make no excerpt",
                hint="Expected a start of 0 or more and a duration above 0",
            )
        self.path = Path(path)
        self.start_s = start_s
        self.duration_s = duration_s
        self.deinterlace = deinterlace
        self.threads = threads
        self.stream = stream
        self.drop = list(drop or ())
        self.device = CPU if device == "auto" else Device.parse(device)
        self.info: MediaInfo | None = None
        self.counts = _Counts()
        self._stop = threading.Event()
        self._spec: FrameSpec | None = None
        self._outlet: nvdec.Outlet | None = None
        self._why_software = ""

    @property
    def trimmed(self) -> bool:
        """Whether only an excerpt is read."""
        return self.start_s > 0 or self.duration_s is not None

    @property
    def in_hardware(self) -> bool:
        """Whether the GPU decodes the file, as far as is known after `plan`."""
        return self.device != CPU and not self._why_software

    def window(self) -> tuple[Fraction, Fraction | None]:
        """Return (start, end) of the excerpt in the file's own time, in seconds."""
        assert self.info is not None
        begin = Fraction(self.info.start_s or 0).limit_denominator(1_000_000)
        start = begin + Fraction(self.start_s).limit_denominator(1_000_000)
        if self.duration_s is None:
            return start, None
        return start, start + Fraction(self.duration_s).limit_denominator(1_000_000)

    def plan(self) -> FrameSpec:
        """Probe the file and return what its frames will be.

        Raises:
            MediaError: it cannot be read as video.
        """
        self.info, first = probe_first_frame(self.path, self.stream)
        video, stream = self.info.video, self.info.video_stream
        if stream.metadata.get("alpha_mode") == "1" and "alpha" not in self.drop:
            raise MediaError(
                f"{stream} of '{self.path}' has transparency, which vidpipe does not carry",
                hint="Use --drop alpha to go on without it",
            )
        if self.duration_s is not None or self.start_s:
            self._check_window()
        self._expect(self.info)
        reader = _Reader(self, stream.time_base, video.color)
        frames = [*reader.take(first), *reader.flush()]
        self._spec = frames[0].spec
        if self.device != CPU:
            self._spec = self._plan_gpu(self._spec)
        return self._spec

    def _plan_gpu(self, spec: FrameSpec) -> FrameSpec:
        """Return the spec of the frames on the GPU; try NVDEC on the first one."""
        assert self.info is not None
        on_device = replace(spec, device=self.device)
        self._why_software = ""
        if self.deinterlace == "always" or (
            self.deinterlace == "auto" and self.info.video.interlaced
        ):
            self._why_software = "its pictures are deinterlaced there"
            return on_device
        accelerator = nvdec.hardware(self.device)
        try:
            with open_input(self.path, accelerator) as container:
                stream = pick_video(container, self.path, self.info.video_index)
                picture = next(container.decode(stream))
                format = nvdec.surface_format(picture)
        except StopIteration:
            self._why_software = "NVDEC gives no picture"
            return on_device
        except nvdec.DECODE_ERRORS as error:
            self._why_software = f"NVDEC does not decode it ({nvdec.why_not(error)})"
            return on_device
        if format is None or (picture.width, picture.height) != (spec.width, spec.height):
            what = picture.sw_format or picture.format
            self._why_software = f"NVDEC gives {what.name}, which is not carried"
            return on_device
        return replace(on_device, format=format)

    def open(self) -> None:
        """Allocate the ring, where frames go to a GPU.

        Raises:
            DeviceError: its memory does not suffice.
        """
        if self.device != CPU:
            assert self._spec is not None
            self._outlet = nvdec.Outlet(self._spec, self.ring_depth, not self._why_software)

    def close(self) -> None:
        """Let go of the ring; planes that somebody holds stay valid."""
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            outlet.close()

    def _check_window(self) -> None:
        assert self.info is not None
        length = self.info.duration_s
        if length is not None and self.start_s >= length:
            raise MediaError(
                f"the excerpt starts at {self.start_s:g} s, but '{self.path}' is "
                f"{length:.3f} s long",
                hint="Use an earlier --start",
            )

    def _expect(self, info: MediaInfo) -> None:
        stream, rate = info.video_stream, info.video.rate
        length_s = stream.duration_s or info.duration_s
        if length_s is not None:
            length_s = max(length_s - self.start_s, 0.0)
            if self.duration_s is not None:
                length_s = min(length_s, self.duration_s)
        self.expected_s = length_s
        if stream.frames and not self.trimmed:
            self.expected_frames = stream.frames
        elif length_s is not None and rate is not None:
            self.expected_frames = round(length_s * rate)

    def stop(self) -> None:
        """End `frames` at the next frame."""
        self._stop.set()

    def frames(self) -> Iterator[Frame]:
        """Yield the frames of the file, or of the excerpt.

        Raises:
            MediaError: the file cannot be opened any more, or its picture cannot be carried.
        """
        if self.info is None:
            self.plan()
        assert self.info is not None
        self.counts = _Counts()
        start, end = self.window() if self.trimmed else (None, None)
        time_base = self.info.video_stream.time_base or Fraction(1, 1000)
        clock = _Clock(self.counts, time_base, self.info.video.rate)
        for frame in self._read(time_base, start):
            pts = clock.next(frame.pts if frame.pts != _NO_PTS else None, frame.duration)
            if start is not None and pts * time_base < start:
                continue
            if end is not None and pts * time_base >= end:
                break
            if self._stop.is_set():
                self.counts.stopped = True
                break
            frame.pts = pts
            self.counts.add(frame)
            yield frame
        else:
            self.counts.complete = True

    def _read(self, time_base: Fraction, start: Fraction | None) -> Iterator[Frame]:
        """Yield every frame from `start` seconds on, or from a key frame before it."""
        given = 0
        last: int | None = None
        try:
            for frame in self._read_by(self.in_hardware, time_base, start):
                given += 1
                last = frame.pts
                yield frame
        except _NotInHardware as error:
            self._why_software = str(error)
        else:
            return
        # The CPU goes on behind the last frame that was given: found again by its timestamp,
        # and where that is missing or not alone in the file, by counting from the start.
        if last is not None and last != _NO_PTS:
            found = False
            for frame in self._read_by(False, time_base, last * time_base):
                if found:
                    yield frame
                found = found or frame.pts == last
            if found:
                return
        counts = self.counts
        counts.corrupt_packets = counts.damaged_frames = counts.read_errors = 0
        for number, frame in enumerate(self._read_by(False, time_base, start)):
            if number >= given:
                yield frame

    def _read_by(
        self, hardware: bool, time_base: Fraction, start: Fraction | None
    ) -> Iterator[Frame]:
        assert self.info is not None
        with self._opened(hardware) as (container, stream):
            if start:
                seek(container, stream, start)
            reader = _Reader(self, time_base, self.info.video.color, self._outlet)
            yield from self._all(container, stream, reader)

    @contextmanager
    def _opened(
        self, hardware: bool
    ) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
        """Open the file, to read nothing but the picture."""
        assert self.info is not None
        accelerator = nvdec.hardware(self.device) if hardware else None
        with open_input(self.path, accelerator) as container:
            stream = pick_video(container, self.path, self.info.video_index)
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = av.stream.Discard.all
            stream.codec_context.thread_type = "AUTO"
            stream.codec_context.thread_count = nvdec.THREADS if hardware else self.threads
            yield container, stream

    def _all(
        self,
        container: av.container.InputContainer,
        stream: av.video.stream.VideoStream,
        reader: _Reader,
    ) -> Iterator[Frame]:
        """Yield every frame from the container's position on, damaged packets skipped."""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                # The demuxer is past repair; keep what came before.
                self.counts.read_errors += 1
                break
            if packet is None:
                break
            if packet.is_corrupt:
                self.counts.corrupt_packets += 1
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                self.counts.corrupt_packets += 1
                continue
            except RuntimeError as error:  # PyAV found no surface to give
                yield from reader.flush()
                raise _NotInHardware(str(error)) from None
            for picture in decoded:
                yield from reader.take(picture)
        yield from reader.flush()

    def read_whole(self) -> bool:
        """Whether every frame of an undamaged file was read."""
        return self.counts.complete and not self.trimmed and not self.report()["damaged"]

    def report(self) -> dict[str, Any]:
        """Return what was read, compared with what the file declares."""
        counts, info = self.counts, self.info
        if info is None:
            return {}
        stream = info.video_stream
        declared_s = stream.duration_s or info.duration_s
        lost_s = self._lost_s(declared_s)
        damaged = counts.corrupt_packets or counts.damaged_frames or counts.read_errors
        return {
            "summary": f"{stream.codec} {info.video.width}x{info.video.height}"
            + (f" on {self._decoder()}" if self.device != CPU else "")
            + (", deinterlaced" if counts.deinterlaced else ""),
            "notes": self._notes(lost_s, bool(damaged)),
            "path": str(self.path),
            "decoder": stream.codec,
            "decoded_on": self._decoder(),
            "frames": counts.frames,
            "declared_frames": stream.frames or None,
            "first_pts": counts.first_pts,
            "last_pts": counts.last_pts,
            "time_base": str(stream.time_base),
            "duration_s": round(counts.duration_s, 6),
            "declared_duration_s": declared_s,
            "lost_s": round(lost_s, 3),
            "gaps_s": round(counts.gaps_s, 3),
            "complete": counts.complete,
            "damaged": bool(damaged or lost_s),
            "corrupt_packets": counts.corrupt_packets,
            "damaged_frames": counts.damaged_frames,
            "read_errors": counts.read_errors,
            "repaired_timestamps": counts.repaired,
            "discontinuities": len(counts.jumps),
            "deinterlaced_frames": counts.deinterlaced,
            "changes": counts.changes,
        }

    def _decoder(self) -> str:
        return f"NVDEC of {self.device}" if self.in_hardware else "cpu"

    def _notes(self, lost_s: float, damaged: bool) -> list[str]:
        """Return what the user should know of the input, a line each."""
        counts, notes = self.counts, []
        if self._why_software:
            notes.append(f"'{self.path}' was decoded on the CPU: {self._why_software}")
        if damaged or lost_s:
            notes.append(
                f"'{self.path}' is damaged: {counts.corrupt_packets} corrupt packets, "
                f"{counts.damaged_frames} damaged frames, {lost_s:.3f} s of the picture lost; "
                f"kept what decodes, {counts.frames} frames"
            )
        elif counts.gaps_s:
            notes.append(f"'{self.path}' has gaps of {counts.gaps_s:.3f} s in its picture")
        if counts.repaired:
            notes.append(f"{counts.repaired} timestamps were missing or not rising; repaired")
        if counts.jumps:
            notes.append(f"timestamps start again {len(counts.jumps)} times; made continuous")
        notes += [
            f"the picture changes at {c['time_s']:.3f} s from {c['from']} to {c['to']}"
            for c in counts.changes
        ]
        return notes

    def _lost_s(self, declared_s: float | None) -> float:
        """Return how many seconds of the picture could not be read."""
        counts, info = self.counts, self.info
        assert info is not None
        damaged = counts.corrupt_packets or counts.damaged_frames or counts.read_errors
        lost_s = counts.gaps_s if damaged else 0.0
        if counts.complete and not self.trimmed and declared_s is not None and counts.frames:
            frame_s = float(1 / info.video.rate) if info.video.rate else 0.04
            missing_s = declared_s - counts.duration_s
            # A file's duration may be that of its longest stream, so a little is no loss.
            other = info.video_stream.duration_s is None
            if missing_s > (max(0.5, 0.02 * declared_s) if other else 2 * frame_s):
                lost_s += missing_s
        return lost_s


_NO_PTS = -(1 << 63)


class _Counts:
    """Facts gathered while reading."""

    def __init__(self) -> None:
        self.frames = 0
        self.first_pts: int | None = None
        self.last_pts: int | None = None
        self.duration_s = 0.0
        self.gaps_s = 0.0  # time without frames in a stream of constant rate
        self.corrupt_packets = 0
        self.damaged_frames = 0
        self.read_errors = 0
        self.repaired = 0
        self.deinterlaced = 0
        self.jumps: list[Fraction] = []
        self.changes: list[dict[str, Any]] = []
        self.complete = False
        self.stopped = False
        self._spec: FrameSpec | None = None
        self._tick = (1, 1)  # seconds as a ratio: fractions take too long for every frame
        self._step_s: float | None = None  # of a constant rate

    def add(self, frame: Frame) -> None:
        if frame.spec is not self._spec:
            self._take_spec(frame)
        number, of = self._tick
        self.frames += 1
        if self._step_s is not None and self.last_pts is not None:
            gap_s = (frame.pts - self.last_pts) * number / of - self._step_s
            self.gaps_s += gap_s if gap_s > 0.5 * self._step_s else 0.0
        if self.first_pts is None:
            self.first_pts = frame.pts
        self.last_pts = frame.pts
        self.duration_s = (frame.pts - self.first_pts + (frame.duration or 0)) * number / of

    def _take_spec(self, frame: Frame) -> None:
        spec = frame.spec
        if self._spec is not None and spec != self._spec:
            self.changes.append({"time_s": frame.time_s, "from": str(self._spec), "to": str(spec)})
        self._spec = spec
        self._tick = spec.time_base.as_integer_ratio()
        self._step_s = None if spec.rate is None else float(1 / spec.rate)


class _Clock:
    """Makes timestamps strictly rising without moving those that already are.

    A missing one becomes the last plus a frame; one that does not rise becomes the last
    plus a tick. A jump back by more than a second is a discontinuity of the file: all that
    follows is shifted to go on from there.
    """

    def __init__(self, counts: _Counts, time_base: Fraction, rate: Fraction | None) -> None:
        self._counts = counts
        self._time_base = time_base
        self._step = max(1, round(1 / ((rate or 25) * time_base)))
        self._second = int(1 / time_base)  # in whole ticks
        self._last: int | None = None
        self._end = 0
        self._offset = 0

    def next(self, pts: int | None, duration: int | None) -> int:
        """Return the timestamp to use for a frame that came with `pts`."""
        if pts is None:
            self._counts.repaired += 1
            pts = 0 if self._last is None else self._end
        else:
            pts += self._offset
            if self._last is not None and self._last - pts > self._second:
                self._offset += self._end - pts
                self._counts.jumps.append(self._offset * self._time_base)
                pts = self._end
            elif self._last is not None and pts <= self._last:
                self._counts.repaired += 1
                pts = self._last + 1
        self._last = pts
        self._end = pts + (duration or self._step)
        return pts


class _NotInHardware(Exception):
    """NVDEC cannot go on with a file; says why."""


class _Reader:
    """Turns decoded pictures into frames: deinterlaced, in a link format, with a spec.

    Args:
        source: what is read.
        time_base: seconds per tick.
        color: of the stream's first picture.
        outlet: brings frames to a GPU; None leaves them in host memory.
    """

    def __init__(
        self, source: Decode, time_base: Fraction, color: Color, outlet: nvdec.Outlet | None = None
    ) -> None:
        self._source = source
        self._outlet = outlet
        self._time_base = time_base
        self._color = color
        self._graph: Deinterlacer | None = None
        self._surfaces: list[av.VideoFrame] = []
        self._spec: FrameSpec | None = None
        self._key: tuple[Any, ...] = ()
        self._format = PIXEL_FORMATS["yuv420p"]
        self._converter: Converter | None = None

    def take(self, picture: av.VideoFrame) -> Iterator[Frame]:
        """Take one decoded picture, give the frames that are ready."""
        if picture.format.name == "cuda":
            # NVDEC stands still while the host turns surfaces into frames, which takes less for
            # some at once than after a wait for each.
            self._surfaces.append(picture)
            if len(self._surfaces) >= self._source.bundle:
                yield from self._take_surfaces()
            return
        yield from self._take_surfaces()
        self._note(picture)
        if self._graph is not None and not self._graph.takes(picture):
            yield from self._flush_graph()
        if self._graph is None and self._wanted(picture):
            self._graph = Deinterlacer(picture, self._time_base, self._source.deinterlace)
        if self._graph is None:
            yield self._frame(picture)
            return
        if picture.interlaced_frame or self._source.deinterlace == "always":
            self._source.counts.deinterlaced += 1
        for done in self._graph.take(picture):
            yield self._frame(done)

    def _note(self, picture: av.VideoFrame) -> None:
        if picture.is_corrupt:
            self._source.counts.damaged_frames += 1
        if picture.pts is None:
            picture.pts = picture.dts

    def _take_surfaces(self) -> Iterator[Frame]:
        surfaces, self._surfaces = self._surfaces, []
        shown: list[tuple[av.VideoFrame, Frame]] = []
        for picture in surfaces:
            self._note(picture)
            try:
                if self._wanted(picture):
                    raise _NotInHardware("its pictures are deinterlaced there")
                frame = self._described(picture, self._spec_of(picture), ())
            except _NotInHardware:
                yield from self._give(shown)
                raise
            if shown and frame.spec is not shown[0][1].spec:
                yield from self._give(shown)
            shown.append((picture, frame))
        yield from self._give(shown)

    def _give(self, shown: list[tuple[av.VideoFrame, Frame]]) -> Iterator[Frame]:
        """Give the frames of surfaces, all of one spec, and empty the list."""
        if not shown:
            return
        assert self._outlet is not None
        frames = deque(self._outlet.from_surfaces(shown))
        shown.clear()
        while frames:
            yield frames.popleft()

    def flush(self) -> Iterator[Frame]:
        """Give what is held back."""
        yield from self._take_surfaces()
        yield from self._flush_graph()

    def _flush_graph(self) -> Iterator[Frame]:
        graph, self._graph = self._graph, None
        if graph is not None:
            for done in graph.flush():
                yield self._frame(done)

    def _wanted(self, picture: av.VideoFrame) -> bool:
        if picture.width < _BWDIF_MIN[0] or picture.height < _BWDIF_MIN[1]:
            return False
        mode = self._source.deinterlace
        return mode == "always" or (mode == "auto" and bool(picture.interlaced_frame))

    def _frame(self, picture: av.VideoFrame) -> Frame:
        spec = self._spec_of(picture)
        if self._converter is not None:
            picture = _with_props(self._converter(picture, spec.resolved_color()), picture)
        frame = self._described(picture, spec, planes_of(picture, self._format))
        return frame if self._outlet is None else self._outlet.from_host(frame)

    @staticmethod
    def _described(picture: av.VideoFrame, spec: FrameSpec, planes: tuple[Any, ...]) -> Frame:
        return Frame(
            planes,
            spec,
            _NO_PTS if picture.pts is None else picture.pts,
            picture.duration or None,
            side_data=_carrier(picture),
        )

    def _spec_of(self, picture: av.VideoFrame) -> FrameSpec:
        key = (
            picture.width,
            picture.height,
            picture.format.name,
            int(picture.colorspace),
            int(picture.color_trc),
            int(picture.color_primaries),
            int(picture.color_range),
            getattr(picture, "chroma_location", None),
        )
        if key == self._key and self._spec is not None:
            return self._spec
        self._key = key
        info = self._source.info
        assert info is not None
        format, same = self._link_format(picture)
        self._format = format
        self._converter = (
            None if same else Converter(picture.width, picture.height, format.name, threads=1)
        )
        self._spec = FrameSpec(
            width=picture.width,
            height=picture.height,
            format=format,
            color=_link_color(picture, self._color, format),
            time_base=self._time_base,
            rate=info.video.rate if info.video.rate_mode == "constant" else None,
            device=self._source.device if picture.format.name == "cuda" else CPU,
        )
        return self._spec

    def _link_format(self, picture: av.VideoFrame) -> tuple[PixelFormat, bool]:
        """Return the format of the link, and whether the picture is in it."""
        if picture.format.name == "cuda":
            format = nvdec.surface_format(picture)
            if format is None:
                raise _NotInHardware("NVDEC gives a format that is not carried")
            return format, True
        format, same = nearest_format(picture.format.name, "alpha" in self._source.drop)
        wanted = format if self._outlet is None else self._outlet.format
        # What NVDEC has begun, the CPU goes on with, in the same format.
        if wanted != format and (wanted.bits, wanted.subsampling) == (
            format.bits,
            format.subsampling,
        ):
            return wanted, False
        return format, same


def _link_color(picture: av.VideoFrame, first: Color, format: PixelFormat) -> Color:
    color = color_of(picture, None)
    if not hasattr(picture, "chroma_location"):
        color = replace(color, site=first.site)
    if format.model == "rgb" and color.range == Range.UNSPECIFIED:
        color = replace(color, range=Range.FULL)
    return color


def _with_props(converted: av.VideoFrame, original: av.VideoFrame) -> av.VideoFrame:
    converted.pts = original.pts
    return converted


# PyAV 18 keeps a picture's list of side data in the picture, and the picture in the list.
_CYCLIC = int(av.__version__.split(".")[0]) < 19
_NOTHING = av.VideoFrame(16, 16, "gray")


def _carrier(picture: av.VideoFrame) -> av.VideoFrame | None:
    """Return a tiny picture that carries the captions of a big one, or None."""
    entries: Any = picture.side_data
    names = {getattr(entry, "type", entry).name for entry in entries}
    if _CYCLIC:
        # The list is made to point at another picture; else big ones would pile up until
        # the garbage collector finds them. FFmpeg's own side data stay where they are.
        entries.__init__(_NOTHING)
    return picture.reformat(16, 16, "gray") if "A53_CC" in names else None
