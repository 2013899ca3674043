"""A file's picture in parts that decode by themselves, cut at key frames.

A part holds the frames whose timestamps lie between those of two key frames. The leading
pictures of an open GOP, which come after a key frame in the file and are shown before it, so
belong to the part before, and its reader goes on until they are out.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import Any

import av.container
import av.error
import av.video.stream

from vidpipe.frame import Frame
from vidpipe.link import LinkClosed
from vidpipe.media.decode import (
    _NO_PTS,
    Decode,
    _Clock,
    _Counts,
    _NotInHardware,
    _Reader,
)
from vidpipe.media.probe import seek

SHORTEST_S = 2.0
LONGEST_S = 10.0
_FEWEST_FRAMES = 16  # more than any encoder reorders
_TRIED_FRAMES = 12


@dataclass(slots=True, eq=False)
class Segment:
    """A part of the picture.

    Attributes:
        index: position in the file.
        start: first timestamp, in ticks; None from the beginning of the file.
        end: the timestamp that ends it and is not in it; None to the end of the file.
        before: where the part before starts; None from the beginning of the file.
        last_pts: timestamp of its last frame, once its reader has got that far.
        counts: facts of its reader.
    """

    index: int
    start: int | None
    end: int | None
    before: int | None = None
    last_pts: int | None = None
    counts: Any = field(default_factory=_Counts)


def cut(source: Decode, length_s: float) -> Iterator[Segment]:
    """Yield the parts of a planned source's file, or of its excerpt, one at a time.

    A part is known as soon as the packets of the next one have been read and are in order.
    From where they are not (timestamps are missing or start again, packets are damaged) all
    the rest is one part.

    Args:
        source: planned.
        length_s: of a part, at least, in seconds of media time.

    Raises:
        MediaError: the file cannot be read any more.
    """
    base = _time_base(source)
    begin, stop = source.window() if source.trimmed else (None, None)
    start = ceil(begin / base) if begin else None
    end = None if stop is None else ceil(stop / base)
    before, proposed, index = start, None, 0
    with _packets(source, begin) as (container, stream):
        for key in _keys(container, stream, ceil(length_s / base), start):
            if key is None:
                proposed = None
                break
            if end is not None and key >= end:
                break
            if proposed is not None:
                yield Segment(index, start, proposed, before)
                index, before, start = index + 1, start, proposed
            proposed = key
    if proposed is not None:
        yield Segment(index, start, proposed, before)
        index, before, start = index + 1, start, proposed
    yield Segment(index, start, end, before)


def _time_base(source: Decode) -> Fraction:
    assert source.info is not None
    return source.info.video_stream.time_base or Fraction(1, 1000)


@contextmanager
def _packets(
    source: Decode, start: Fraction | None
) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """Open a file to read its picture from a key frame at or before `start` seconds."""
    with source._opened(hardware=False) as (container, stream):
        if start:
            seek(container, stream, start)
        yield container, stream


def _keys(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    least: int,
    start: int | None,
) -> Iterator[int | None]:
    """Yield the timestamps of key frames to cut at, then None if the rest is not in order.

    Args:
        least: ticks between two of them.
        start: timestamp that the first part begins at, if not with the first packet.
    """
    begin, floor = start, None
    top: int | None = None
    decoded: int | None = None
    seen: set[int] = set()
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            pts, dts = packet.pts, packet.dts
            if pts is None or packet.is_corrupt or pts in seen:
                yield None
                return
            back = dts is not None and decoded is not None and dts <= decoded
            if back or (floor is not None and pts < floor):
                yield None
                return
            begin = pts if begin is None else begin
            clean = packet.is_keyframe and (top is None or pts > top)
            if clean and pts - begin >= least and len(seen) >= _FEWEST_FRAMES:
                yield pts
                floor, begin = begin, pts
                seen.clear()
            seen.add(pts)
            top = pts if top is None else max(top, pts)
            decoded = dts if dts is not None else decoded
    except av.error.FFmpegError:
        yield None


def starts_clean(source: Decode, segment: Segment) -> bool:
    """Try whether the frames of a part decode without what comes before it in the file.

    Streams that are refreshed bit by bit flag pictures as key frames that are none.
    """
    if segment.start is None:
        return True
    base = _time_base(source)
    sent: list[int] = []
    shown: list[int] = []
    with _packets(source, segment.start * base) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.pts is not None and packet.pts >= segment.start:
                    sent.append(packet.pts)
                for picture in packet.decode():
                    if picture.pts is None or picture.pts < segment.start:
                        continue
                    if picture.is_corrupt:
                        return False
                    shown.append(picture.pts)
                if len(shown) >= _TRIED_FRAMES:
                    break
        except av.error.FFmpegError:
            return False
    return bool(shown) and shown == sorted(sent)[: len(shown)]


def add_counts(whole: _Counts, part: _Counts) -> None:
    """Add the facts of the next part of a file to those of the parts before it."""
    if part.first_pts is None or part.last_pts is None or part._spec is None:
        return
    spec, before = part._spec, whole._spec
    if before is not None and before != spec:
        time_s = float(part.first_pts * spec.time_base)
        whole.changes.append({"time_s": time_s, "from": str(before), "to": str(spec)})
    if spec.rate is not None and whole.last_pts is not None:
        step_s = float(1 / spec.rate)
        gap_s = float((part.first_pts - whole.last_pts) * spec.time_base) - step_s
        whole.gaps_s += gap_s if gap_s > 0.5 * step_s else 0.0
    if whole.first_pts is None:
        whole.first_pts = part.first_pts
    whole.duration_s = part.duration_s + float((part.first_pts - whole.first_pts) * spec.time_base)
    whole.last_pts = part.last_pts
    whole.complete = part.complete
    whole._spec = spec
    for name in ("frames", "corrupt_packets", "damaged_frames", "read_errors", "repaired"):
        setattr(whole, name, getattr(whole, name) + getattr(part, name))
    whole.gaps_s += part.gaps_s
    whole.deinterlaced += part.deinterlaced
    whole.changes += part.changes


class Schedule:
    """Hands parts to workers in the order of the file, and their packets on in that order.

    Args:
        segments: the parts.
        ahead: parts that may be begun before the first of them is joined.
    """

    def __init__(self, segments: Iterator[Segment], ahead: int) -> None:
        self.taken: list[Segment] = []
        self._segments = segments
        self._ahead = ahead
        self._changed = threading.Condition()
        self._cutting = threading.Lock()  # held by the worker that waits for its next part
        self._starts: list[int] = []
        self._queues: list[deque[tuple[list[Any], Any]]] = []
        self._joined = 0
        self._ended = False
        self._aborted = False

    def take(self) -> Segment | None:
        """Return the next part to work on, or None when there are no more.

        Raises:
            LinkClosed: the run was aborted.
        """
        with self._cutting:
            with self._changed:
                self._changed.wait_for(self._may_take)
                segments = iter(()) if self._ended else self._segments
            # This reads on in the file; those who ask where a frame belongs do not wait for it.
            segment = next(segments, None)
            return self._took(segment)

    def _may_take(self) -> bool:
        ended = self._aborted or self._ended
        return ended or len(self.taken) < self._joined + self._ahead

    def _took(self, segment: Segment | None) -> Segment | None:
        with self._changed:
            if self._aborted:
                raise LinkClosed
            if segment is None or self._ended:
                self._ended = True
                segment = None
            else:
                self.taken.append(segment)
                self._starts.append(_NO_PTS if segment.start is None else segment.start)
                self._queues.append(deque())
            self._changed.notify_all()
            return segment

    def at(self, pts: int) -> Segment:
        """Return the part, among those taken, that a timestamp lies in."""
        with self._changed:
            return self.taken[max(bisect_right(self._starts, pts) - 1, 0)]

    def put(self, segment: Segment, packets: list[Any], facts: Any = None) -> None:
        """Hand on packets of a part; `facts` come with the last ones."""
        with self._changed:
            self._queues[segment.index].append((packets, facts))
            self._changed.notify_all()

    def parts(self) -> Iterator[tuple[Segment, list[Any], Any]]:
        """Yield (part, packets, facts) in the order of the file, until all are joined.

        Raises:
            LinkClosed: the run was aborted.
        """
        while True:
            with self._changed:
                self._changed.wait_for(self._some)
                if self._aborted:
                    raise LinkClosed
                if self._joined == len(self.taken):
                    return
                segment = self.taken[self._joined]
                packets, facts = self._queues[segment.index].popleft()
            yield segment, packets, facts
            if facts is not None:
                with self._changed:
                    self._joined += 1
                    self._changed.notify_all()

    def _some(self) -> bool:
        if self._joined == len(self.taken):
            return self._aborted or self._ended
        return self._aborted or bool(self._queues[self._joined])

    def stop(self) -> None:
        """Begin no more parts."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the file that the parts are found in."""
        with self._changed:
            self._ended = True
            self._segments = iter(())

    def abort(self) -> None:
        """Wake everybody who waits, to give up."""
        with self._changed:
            self._aborted = True
            self._segments = iter(())
            self._changed.notify_all()


class RangeDecode(Decode):
    """Reads those parts of a file that a schedule gives it.

    Args:
        schedule: gives the parts; shared with the other workers.
        options: of `Decode`.
    """

    def __init__(self, *, schedule: Schedule, **options: Any) -> None:
        super().__init__(**options)
        self.schedule = schedule
        self.waited_s = 0.0
        self._segment: Segment | None = None
        self._given = 0  # frames of the part

    def open(self) -> None:
        """Allocate the ring, where frames go to a GPU.

        Raises:
            DeviceError: its memory does not suffice.
        """
        self.ring_depth += 1  # the frame that is looked at ahead
        super().open()

    def report(self) -> dict[str, Any]:
        """Return where it was decoded; what was read is in the counts of the parts."""
        note = f"'{self.path}' was decoded on the CPU: {self._why_software}"
        return {"decoded_on": self._decoder(), "notes": [note] if self._why_software else []}

    def stop(self) -> None:
        """Take no more parts; what was begun is read to its end."""
        self.schedule.stop()

    def frames(self) -> Iterator[Frame]:
        """Yield the frames of the parts.

        Raises:
            MediaError: the file cannot be opened any more, or its picture cannot be carried.
        """
        try:
            yield from self._parts(self.in_hardware)
        except _NotInHardware as error:
            # The CPU reads the part again, and passes over what was given already.
            self._why_software = str(error)
            self.counts.repaired = 0
            self.counts.jumps.clear()
            yield from self._parts(False)

    def _parts(self, hardware: bool) -> Iterator[Frame]:
        assert self.info is not None
        base = _time_base(self)
        with self._opened(hardware) as (container, stream):
            while True:
                if self._segment is None:
                    start_s = self.clock.now_s()
                    self._segment = self.schedule.take()
                    self.waited_s += self.clock.now_s() - start_s
                if self._segment is None:
                    return
                self.counts = self._segment.counts
                clock = _Clock(self.counts, base, self.info.video.rate)
                yield from self._part(self._segment, self._from(container, stream), clock)
                self._segment = None
                self._given = 0

    def _part(self, segment: Segment, frames: Iterator[Frame], clock: _Clock) -> Iterator[Frame]:
        """Yield the frames of a part; which is the last is known before it is given."""
        held: Frame | None = None
        passed = self._given
        for frame in frames:
            frame.pts = clock.next(frame.pts if frame.pts != _NO_PTS else None, frame.duration)
            if segment.end is not None and frame.pts >= segment.end:
                break
            if passed > 0:
                passed -= 1
                continue
            if held is not None:
                yield self._count(held)
            held = frame
            del frame
        else:
            segment.counts.complete = True
        if held is None:
            self.schedule.put(segment, [], ())
            return
        segment.last_pts = held.pts
        yield self._count(held)

    def _count(self, frame: Frame) -> Frame:
        self._given += 1
        self.counts.add(frame)
        return frame

    def _from(
        self, container: av.container.InputContainer, stream: av.video.stream.VideoStream
    ) -> Iterator[Frame]:
        """Yield all frames from the start of the part on."""
        segment = self._segment
        assert segment is not None
        assert self.info is not None
        base, counts = _time_base(self), segment.counts
        if segment.start is None:
            yield from self._all(container, stream, self._reader())
            return
        found = False
        for place in (segment.start, segment.before):
            if place is None:
                container.seek(0)
            else:
                seek(container, stream, place * base)
            damage = counts.corrupt_packets, counts.damaged_frames
            last = place == segment.before
            for frame in self._all(container, stream, self._reader()):
                if not found and frame.pts < segment.start:
                    # Of leading pictures that lack what they refer to.
                    counts.corrupt_packets, counts.damaged_frames = damage
                    continue
                clean = frame.pts == segment.start and counts.damaged_frames == damage[1]
                if not found and not last and segment.index and not clean:
                    counts.corrupt_packets, counts.damaged_frames = damage
                    break
                found = True
                yield frame
            if found:
                return

    def _reader(self) -> _Reader:
        assert self.info is not None
        return _Reader(self, _time_base(self), self.info.video.color, self._outlet)
