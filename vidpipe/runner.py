"""One stage of a running pipeline: what its thread does, and what it counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vidpipe import trace
from vidpipe.device import CPU, setup_lock
from vidpipe.errors import VidpipeError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Node
from vidpipe.link import Link, LinkClosed
from vidpipe.stage import Actor, Sink, Source, Stage

if TYPE_CHECKING:
    from vidpipe.pipeline import Pipeline


@dataclass(slots=True)
class StageReport:
    """What one stage did.

    Attributes:
        name, use: as in the graph.
        frames_in, frames_out: frames taken and given; a source takes none, a sink gives none.
        dropped: frames that came too late for a live graph, on the way to this stage.
        busy_s: time inside the stage's own code, `open` and `close` not counted.
        open_s: time to allocate, compile and warm up.
        fps: frames per second of its busy time, its own limit; None when it did nothing.
        waited_for_input_s, waited_for_output_s: time held up by its neighbours.
        facts: what the stage itself reports.
    """

    name: str
    use: str
    frames_in: int = 0
    frames_out: int = 0
    dropped: int = 0
    busy_s: float = 0.0
    open_s: float = 0.0
    fps: float | None = None
    waited_for_input_s: float = 0.0
    waited_for_output_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class Runner:
    """One stage, its thread and its links."""

    def __init__(self, node: Node, actor: Actor, pipeline: Pipeline) -> None:
        self.node = node
        self.writer = node.source  # the runner that its frames come from
        self.actor = actor
        self.pipeline = pipeline
        self.input: Link | None = None
        self.outputs: list[Link] = []
        self.report = StageReport(node.name, node.use or type(actor).__name__)
        self.spec: FrameSpec | None = None
        self.pts: int | None = None  # of the frame at hand, in ticks of `time_base`
        self.time_base = Fraction(1)
        self._finished_pts: int | None = None  # frames up to there are finished on the GPU
        self.first_s: float | None = None
        self.end_pts = 0  # where the frames taken so far end
        self.track: trace.Track | None = None  # while somebody profiles
        self.queues: list[str] = []  # names of the outputs, likewise
        self.thread = threading.Thread(target=self._run, name=f"vidpipe-{node.name}")

    @property
    def time_s(self) -> float | None:
        """Media time of the frame at hand; worked out only when somebody asks."""
        return None if self.pts is None else float(self.pts * self.time_base)

    @property
    def media_s(self) -> float:
        """Media time that the frames taken so far cover."""
        end_s = float(self.end_pts * self.time_base)
        return 0.0 if self.first_s is None else end_s - self.first_s

    def _run(self) -> None:
        clock = self.pipeline.clock
        trace.use(self.track)
        try:
            try:
                start_s = clock.now_s()
                try:
                    self._open()
                finally:
                    self.pipeline._gate.arrive()
                self.report.open_s = clock.now_s() - start_s
                if self.track is not None:
                    self.track.span("open", start_s, start_s + self.report.open_s)
                if isinstance(self.actor, Source):
                    self.pipeline._gate.wait()
                    self._run_source(self.actor)
                elif isinstance(self.actor, Stage):
                    self._run_stage(self.actor)
                else:
                    self._run_sink(self.actor)
            finally:
                self.actor.close()
            for link in self.outputs:
                link.end()
        except LinkClosed:
            pass
        except VidpipeError as error:
            self.pipeline._fail(error.at(self.node.name, self.time_s))
        except BaseException as error:
            wrapped = VidpipeError(f"{type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self.pipeline._fail(wrapped.at(self.node.name, self.time_s))

    def _open(self) -> None:
        if isinstance(self.actor, Stage) and self.input is not None:
            self.actor.wake = self.input.wake
        if not self.pipeline._on_gpu:
            self.actor.open()
            return
        with setup_lock:
            self.actor.open()

    def _run_source(self, source: Source) -> None:
        for frame in self._timed(source.frames):
            frame.captured_s = frame.captured_s or self.pipeline.clock.now_s()
            self._emit(frame)
            del frame
            if self.pipeline._stopping:
                break

    def _run_stage(self, stage: Stage) -> None:
        for frame in self._input():
            if frame is None:
                for out in self._timed(stage.ready):
                    self._emit(out)
                    del out
                continue
            if self._changed(frame):
                for out in self._timed(stage.flush):
                    self._emit(out)
                self._time(stage.replan, frame.spec)
            self._took(frame)
            for out in self._timed(stage.process, frame):
                self._emit(out)
                del out
            del frame
        for out in self._timed(stage.flush):
            self._emit(out)

    def _run_sink(self, sink: Sink) -> None:
        for frame in self._input():
            if frame is None:
                continue
            if self._changed(frame):
                self._time(sink.replan, frame.spec)
            self._took(frame)
            self._time(sink.write, frame)
            self.end_pts = frame.pts + (frame.duration or 0)
            if self.first_s is None:
                self.first_s = frame.time_s
                self.pipeline._first_frame()
            del frame
        self._time(sink.finish)

    def _input(self) -> Iterator[Frame | None]:
        """Return the frames that come; None where the actor has something ready between them."""
        assert self.input is not None
        if self.track is None:
            return self.input.items()
        return self._traced_input(self.input, self.track)

    def _traced_input(self, link: Link, track: trace.Track) -> Iterator[Frame | None]:
        clock = self.pipeline.clock
        frames = link.items()
        while True:
            waited_s, start_s = link.statistics().reader_waited_s, clock.now_s()
            try:
                frame = next(frames)
            except StopIteration:
                return
            finally:
                end_s, seen = clock.now_s(), link.statistics()
                if seen.reader_waited_s > waited_s:
                    track.span("wait for input", start_s, end_s)
            if frame is None:
                yield None
                continue
            pts = track.pts = frame.pts
            track.count(f"queue to {self.node.name}", seen.queued)
            yield frame
            del frame
            track.span("frame", end_s, clock.now_s(), pts=pts)

    def _changed(self, frame: Frame) -> bool:
        return frame.spec is not self.spec and frame.spec != self.spec

    def _took(self, frame: Frame) -> None:
        if frame.ready is not None and frame.spec.device == CPU:
            # NumPy knows no streams: a copy from a GPU has to be over before it is read.
            self._finish(frame)
            frame.ready = None
        self.spec = frame.spec
        self.pts, self.time_base = frame.pts, frame.spec.time_base
        self.report.frames_in += 1

    def _finish(self, frame: Frame) -> None:
        """Wait until a frame is finished; the first of a bundle until they all are."""
        assert self.input is not None
        bundle = self.input.bundle
        if bundle > 1 and (self._finished_pts is None or frame.pts > self._finished_pts):
            last = self.input.peek(bundle - 2) or frame
            self._finished_pts = last.pts
            last.synchronize()
        frame.synchronize()

    def _emit(self, frame: Frame) -> None:
        self.pts, self.time_base = frame.pts, frame.spec.time_base
        self.report.frames_out += 1
        if self.track is not None:
            self._traced_emit(frame, self.track)
            return
        for link in self.outputs:
            link.put(frame)

    def _traced_emit(self, frame: Frame, track: trace.Track) -> None:
        clock = self.pipeline.clock
        for link, queue in zip(self.outputs, self.queues, strict=True):
            waited_s, start_s = link.statistics().writer_waited_s, clock.now_s()
            link.put(frame)
            seen = link.statistics()
            if seen.writer_waited_s > waited_s:
                track.span("wait for room", start_s, clock.now_s(), pts=frame.pts)
            track.count(queue, seen.queued)

    def _time(self, call: Callable[..., Any], *arguments: Any) -> None:
        start_s = self._begin(call)
        try:
            call(*arguments)
        finally:
            self._end(call, start_s)

    def _timed(self, call: Callable[..., Iterable[Frame]], *arguments: Any) -> Iterator[Frame]:
        """Yield the frames that a call gives, and count the time that making them takes."""
        start_s = self._begin(call)
        for frame in call(*arguments):
            self._end(call, start_s, frame)
            yield frame
            del frame
            start_s = self._begin(call)
        self._end(call, start_s)

    def _begin(self, call: Callable[..., Any]) -> float:
        if self.track is not None:
            self.track.push(f"{self.node.name}: {call.__name__}")
        return self.pipeline.clock.now_s()

    def _end(self, call: Callable[..., Any], start_s: float, frame: Frame | None = None) -> None:
        end_s = self.pipeline.clock.now_s()
        self.report.busy_s += end_s - start_s
        if self.track is not None:
            self.track.pop()
            facts = {} if frame is None else {"pts": frame.pts}
            self.track.span(call.__name__, start_s, end_s, **facts)
