"""A profile of a run: what every actor and the GPU did, on one time line.

A `Tracer` collects spans and writes them as Chrome's trace-event JSON, which Perfetto shows.
A pipeline that was given one makes a `Track` for each actor. While nobody profiles there is
no track, and that is all there is to it: a test for None.

GPU work is found at the streams: what a stage queues between the last event that its stream
waits for and the next event that it records is one piece of work. Around it two events that
keep time are recorded. They are read when they are long over, never waited for.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vidpipe.clock import Clock, MonotonicClock
from vidpipe.errors import OutputError

_ACTORS, _GPU = 0, 1
_OLD = 256
_REBASE_MS = 2000.0
_FACTS = ("summary", "device", "nodes", "cuda_graph", "decoded_on")

_local = threading.local()


class Track:
    """The spans of one actor; written to by its thread alone.

    Attributes:
        work: what the actor's work on a GPU is called.
    """

    def __init__(self, tracer: Tracer, group: int, number: int, name: str, work: str) -> None:
        self._tracer = tracer
        self._group = group
        self._number = number
        self.name = name
        self.work = work
        self.nvtx: Any = None
        self.pts: int | None = None

    def span(self, name: str, start_s: float, end_s: float, **facts: Any) -> None:
        """Add something that lasted, in seconds of the tracer's clock."""
        self._tracer._events.append(
            _complete(name, self._group, self._number, start_s, end_s - start_s, facts)
        )

    def count(self, name: str, value: float) -> None:
        """Add the value that a counter has from now on."""
        event = {"ph": "C", "name": name, "pid": self._group, "ts": self._tracer.clock.now_s()}
        self._tracer._events.append(event | {"args": {"value": value}})

    def beside(self, name: str) -> Track:
        """Return a track for another thread of the same actor."""
        return self._tracer.track(self._group, f"{self.name}: {name}", self.work)

    def push(self, name: str) -> None:
        """Begin a range of NVTX, where the pipeline is on a GPU."""
        if self.nvtx is not None:
            self.nvtx.RangePush(name)

    def pop(self) -> None:
        """End the last range of NVTX."""
        if self.nvtx is not None:
            self.nvtx.RangePop()

    def follow(self, stream: Any) -> None:
        """Record events around the work that is queued on a stream from now on.

        Args:
            stream: a `cupy.cuda.Stream` of this track's thread, idle. Waited for here.
        """
        self._tracer._streams.append(_StreamClock(self._tracer, self, stream))


class _DeviceClock:
    """Brings the times of one GPU's events to the host's time line.

    All streams of a GPU share it: one that was anchored by itself would stand beside the others
    by as much as the host was late when it looked at its clock.
    """

    def __init__(self, tracer: Tracer, stream: Any) -> None:
        self._clock = tracer.clock
        self.new_event, self.elapsed_ms, self.on_device = tracer._cuda(stream)
        self._stream = stream
        # The event by which the next is timed, and the milliseconds from the first one to it.
        self._base, self._start_s = self._anchor()
        self._base_ms = 0.0
        self._scale = 0.001

    def _anchor(self) -> tuple[Any, float]:
        """Return an event and the host's time at which it was reached; waits for it."""
        best: tuple[float, Any, float] | None = None
        for _ in range(5):
            event = self.new_event()
            before_s = self._clock.now_s()
            event.record(self._stream)
            event.synchronize()
            after_s = self._clock.now_s()
            if best is None or after_s - before_s < best[0]:
                best = after_s - before_s, event, (before_s + after_s) / 2
        assert best is not None
        return best[1], best[2]

    def place(self, event: Any) -> float:
        """Return when an event was that is over and no older than any before, in milliseconds."""
        passed_ms: float = self.elapsed_ms(self._base, event)
        placed_ms = self._base_ms + passed_ms
        if passed_ms > _REBASE_MS:  # the runtime's times are in single precision
            self._base, self._base_ms = event, placed_ms
        return placed_ms

    def finish(self) -> None:
        """Compare the two clocks once more, which differ by some parts in a million."""
        last, end_s = self._anchor()
        total_ms = self.place(last)
        if total_ms > 0:
            self._scale = (end_s - self._start_s) / total_ms

    def span_s(self, first_ms: float, last_ms: float) -> tuple[float, float]:
        """Return (start, length) in seconds of the host's clock; after `finish`."""
        return self._start_s + first_ms * self._scale, (last_ms - first_ms) * self._scale


class _StreamClock:
    """Times the work on one stream."""

    def __init__(self, tracer: Tracer, track: Track, stream: Any) -> None:
        self._tracer = tracer
        self._track = track
        self._stream = stream
        self._clock = clock = tracer._clock_of(stream)
        self._spare: list[Any] = []
        self._pending: deque[tuple[Any, Any, int | None]] = deque()
        self._begun: Any = None
        self._number = tracer._new_number(track._group)
        tracer._name(track._group + _GPU, self._number, f"{track.name} ({track.work})")
        self._base = self._event()
        self._base.synchronize()
        with tracer._lock:
            self._base_ms = clock.place(self._base)
        self._spans: list[tuple[float, float, int | None]] = []
        self._wait_event: Callable[[Any], None] = stream.wait_event
        self._record: Callable[..., Any] = stream.record
        stream.wait_event, stream.record = self._waited, self._recorded

    def _event(self) -> Any:
        event = self._spare.pop() if self._spare else self._clock.new_event()
        event.record(self._stream)
        return event

    def _waited(self, event: Any) -> None:
        self._wait_event(event)
        if self._begun is not None:
            self._spare.append(self._begun)
        self._begun = self._event()

    def _recorded(self, event: Any = None) -> Any:
        if self._begun is not None:
            self._pending.append((self._begun, self._event(), self._track.pts))
            self._begun = None
            if len(self._pending) > _OLD:
                self._read_old()
        return self._record() if event is None else self._record(event)

    def _read_old(self) -> None:
        while self._pending and self._pending[0][1].done:
            self._read()

    def _read(self) -> None:
        begin, end, pts = self._pending.popleft()
        first_ms = self._clock.elapsed_ms(self._base, begin)
        last_ms = self._clock.elapsed_ms(self._base, end)
        self._spans.append((self._base_ms + first_ms, self._base_ms + last_ms, pts))
        self._spare.append(begin)
        if last_ms > _REBASE_MS:  # see `_DeviceClock.place`
            self._base_ms += last_ms
            self._base = end
        else:
            self._spare.append(end)

    def read_all(self) -> None:
        """Read what is left; waits for the stream."""
        self._stream.wait_event, self._stream.record = self._wait_event, self._record
        with self._clock.on_device:
            self._event().synchronize()
            while self._pending:
                self._read()

    def add_spans(self) -> None:
        """Add the spans to the profile."""
        track = self._track
        for first_ms, last_ms, pts in self._spans:
            facts = {} if pts is None else {"pts": pts}
            start_s, length_s = self._clock.span_s(first_ms, last_ms)
            self._tracer._events.append(
                _complete(track.work, track._group + _GPU, self._number, start_s, length_s, facts)
            )
        self._spans.clear()


class Tracer:
    """Collects a profile.

    Args:
        path: the file that `write` will write.
        clock: of the pipelines that are profiled.

    Raises:
        OutputError: there is no folder for the file.
    """

    def __init__(self, path: Path | None = None, *, clock: Clock | None = None) -> None:
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"the folder '{path.parent}' does not exist", hint="Make it first")
        self.path = path
        self.clock = clock or MonotonicClock()
        self.facts: dict[str, Any] = {}
        """Put into the profile's metadata; JSON-compatible."""
        self._start_s = self.clock.now_s()
        self._events: list[dict[str, Any]] = []
        self._streams: list[_StreamClock] = []
        self._clocks: dict[int, _DeviceClock] = {}
        self._groups = 0
        self._numbers: dict[int, int] = {}
        self._lock = threading.Lock()

    def group(self, name: str) -> int:
        """Return the number of a new group of tracks, such as a pipeline."""
        with self._lock:
            group = 1 + 2 * self._groups
            self._groups += 1
        for offset, what in ((_ACTORS, name), (_GPU, f"{name}: GPU")):
            pid = group + offset
            self._events += [
                {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": what}},
                {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}},
            ]
        return group

    def track(self, group: int, name: str, work: str = "work", *, nvtx: bool = False) -> Track:
        """Return a new track.

        Args:
            group: of `group`.
            name: of the actor.
            work: what its work on a GPU is called.
            nvtx: make NVTX ranges too, for Nsight.
        """
        number = self._new_number(group)
        self._name(group, number, name)
        track = Track(self, group, number, name, work)
        if nvtx:
            import cupy

            track.nvtx = cupy.cuda.nvtx if cupy.cuda.nvtx.available else None
        return track

    def _new_number(self, group: int) -> int:
        with self._lock:
            number = self._numbers[group] = self._numbers.get(group, 0) + 1
        return number

    def _name(self, pid: int, number: int, name: str) -> None:
        common = {"ph": "M", "pid": pid, "tid": number}
        self._events += [
            common | {"name": "thread_name", "args": {"name": name}},
            common | {"name": "thread_sort_index", "args": {"sort_index": number}},
        ]

    def _cuda(self, stream: Any) -> tuple[Callable[[], Any], Callable[[Any, Any], float], Any]:
        """Return (make a timing event, milliseconds between two, the stream's device)."""
        import cupy

        cuda = cupy.cuda
        return cuda.Event, cuda.get_elapsed_time, cuda.Device(stream.device_id)

    def _clock_of(self, stream: Any) -> _DeviceClock:
        """Return the clock of a stream's GPU."""
        with self._lock:
            clock = self._clocks.get(stream.device_id)
            if clock is None:
                clock = self._clocks[stream.device_id] = _DeviceClock(self, stream)
        return clock

    def add_run(self, title: str, stages: Iterable[Any]) -> None:
        """Put what an ended run reports into the metadata, nodes by provider among it.

        Args:
            title: of the graph.
            stages: the reports of its stages, `vidpipe.pipeline.StageReport`.
        """
        described = [
            {
                "stage": stage.name,
                "use": stage.use,
                "frames_in": stage.frames_in,
                "frames_out": stage.frames_out,
                "busy_s": round(stage.busy_s, 6),
                **{key: stage.facts[key] for key in _FACTS if key in stage.facts},
            }
            for stage in stages
        ]
        self.facts.setdefault("runs", []).append({"graph": title, "stages": described})

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as Chrome's trace-event JSON; to be called after the run."""
        for stream in self._streams:
            stream.read_all()
        for clock in self._clocks.values():
            with clock.on_device:
                clock.finish()
        for stream in self._streams:
            stream.add_spans()
        self._streams.clear()
        timed = sorted((e for e in self._events if "ts" in e), key=lambda e: float(e["ts"]))
        events = [e for e in self._events if "ts" not in e]
        for event in timed:
            copy = event | {"ts": _microseconds(event["ts"] - self._start_s)}
            if "dur" in event:
                copy["dur"] = _microseconds(event["dur"])
            events.append(copy)
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": self.facts}

    def write(self) -> None:
        """Write the profile; to be called after the run.

        Raises:
            OutputError: the file cannot be written.
        """
        assert self.path is not None
        try:
            self.path.write_text(json.dumps(self.to_dict()), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror or error}") from error


def use(track: Track | None) -> None:
    """Say that the calling thread is the one of this track."""
    _local.track = track


def current() -> Track | None:
    """Return the track of the calling thread's actor; None when nobody profiles."""
    track: Track | None = getattr(_local, "track", None)
    return track


def follow(stream: Any) -> Any:
    """Return the stream; its work is profiled if the calling thread's actor is."""
    track = current()
    if track is not None:
        track.follow(stream)
    return stream


def _complete(
    name: str, pid: int, tid: int, start_s: float, length_s: float, facts: dict[str, Any]
) -> dict[str, Any]:
    event = {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start_s, "dur": length_s}
    return event | {"args": facts} if facts else event


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
