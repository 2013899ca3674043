"""Pipelines that run on command: open once, then so many frames at a time.

A rig stays open between its bursts, so rigs can take turns within one process, and what
opening costs (compiling, capturing, allocating) is in no figure. A burst is timed at the sink,
from the frame that ends the lead-in to the last one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil

from vidpipe.clock import processor_s
from vidpipe.device import CPU, Device, host_waits, import_cupy
from vidpipe.errors import MediaError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.media.decode import Decode
from vidpipe.pipeline import Pipeline, Report, StartGate
from vidpipe.stage import Null, Sink, Source, Stage
from vidpipe.trace import Tracer, current

LEAD_IN = 32
"""Frames before the timed ones, at most."""


def step_of(spec: FrameSpec) -> int:
    """Return the ticks from one frame to the next."""
    return max(1, round(1 / ((spec.rate or 25) * spec.time_base)))


class Repeat(Source):
    """Gives a few frames over and over, to and fro, at no cost.

    Args:
        frames: ready, on any device; nobody writes to them.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = [*frames, *frames[-2:0:-1]]

    def plan(self) -> FrameSpec:
        """Return the frames' spec."""
        return self._frames[0].spec

    def frames(self) -> Iterator[Frame]:
        """Yield frames for ever."""
        step = step_of(self.plan())
        for number in itertools.count():
            like = self._frames[number % len(self._frames)]
            yield Frame(like.planes, like.spec, number * step, duration=step)


class Loop(Source):
    """Reads a file again and again; each time it is opened anew, and time goes on."""

    bundles = True

    def __init__(self, decode: Decode) -> None:
        self.decode = decode

    def plan(self) -> FrameSpec:
        """Plan the decoder."""
        return self.decode.plan()

    def open(self) -> None:
        """Open the decoder."""
        self.decode.ring_depth, self.decode.bundle = self.ring_depth, self.bundle
        self.decode.open()

    def frames(self) -> Iterator[Frame]:
        """Yield frames until stopped.

        Raises:
            MediaError: the file gives no frame.
        """
        offset = 0
        while True:
            first: int | None = None
            end = 0
            for frame in self.decode.frames():
                first = frame.pts if first is None else first
                end = frame.pts + (frame.duration or step_of(frame.spec))
                frame.pts += offset
                yield frame
                del frame
            if self.decode.counts.stopped:
                return
            if first is None:
                raise MediaError(f"'{self.decode.path}' gives no frame")
            offset += end - first

    def stop(self) -> None:
        """End at the next frame."""
        self.decode.stop()

    def close(self) -> None:
        """Close the decoder."""
        self.decode.close()

    def report(self) -> dict[str, Any]:
        """Return the decoder's report, of the last time round."""
        return self.decode.report()


class _Bursts(Source):
    """Gives another source's frames only when told, so many at a time."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.bundles = inner.bundles
        self._changed = threading.Condition()
        self._wanted = 0
        self._stopped = False

    def plan(self) -> FrameSpec:
        return self._inner.plan()

    def open(self) -> None:
        self._inner.ring_depth, self._inner.bundle = self.ring_depth, self.bundle
        self._inner.open()

    def give(self, count: int) -> None:
        with self._changed:
            self._wanted += count
            self._changed.notify_all()

    def frames(self) -> Iterator[Frame]:
        frames = self._inner.frames()
        while True:
            start_s = self.clock.now_s()
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stopped)
                if self._stopped:
                    return
                count, self._wanted = self._wanted, 0
            track = current()
            if track is not None:
                track.span("other rigs' turns", start_s, self.clock.now_s())
            yield from itertools.islice(frames, count)

    def stop(self) -> None:
        self._inner.stop()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        self._inner.close()

    def report(self) -> dict[str, Any]:
        return self._inner.report()


class HostNull(Null):
    """Takes frames in host memory and keeps nothing."""

    def device_for(self, spec: FrameSpec) -> Device:  # noqa: ARG002
        """Take frames on the CPU, so the pipeline copies them there."""
        return CPU


@dataclass(frozen=True, slots=True)
class Moment:
    """What the clocks and counters say at one frame.

    Attributes:
        time_s: the pipeline's clock.
        pool: CuPy's memory pools: used_bytes, total_bytes, free_blocks, pinned_free_blocks.
        waits: how often threads waited for the GPU, by name.
    """

    time_s: float
    pool: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Burst:
    """One timed stretch of frames.

    Attributes:
        frames: how many; begin, end: of the stretch, at the sink.
        processor_s: processor time of the process a frame. The lead-in is in it and in its
            frames, since the source is ahead of the sink by a part of them.
        threads: the same by thread name, "other" for those that Python does not know.
    """

    frames: int
    begin: Moment
    end: Moment
    processor_s: float
    threads: dict[str, float] = field(default_factory=dict)

    @property
    def wall_s(self) -> float:
        """Time of the timed frames."""
        return self.end.time_s - self.begin.time_s

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.frames / self.wall_s if self.wall_s > 0 else float("inf")


class Around(Sink):
    """Another sink, with something done beside it; subclasses say what, in `write`."""

    def __init__(self, inner: Sink) -> None:
        self._inner = inner
        self.policy = inner.policy
        self.capacity = inner.capacity
        self.device = CPU

    def attach(self, source: Source) -> None:
        """Let the sink know its source."""
        self._inner.attach(source)

    def device_for(self, spec: FrameSpec) -> Device:
        """Take frames where the sink does."""
        return self._inner.device_for(spec)

    def plan(self, spec: FrameSpec) -> None:
        """Plan the sink."""
        self.device = spec.device
        self._inner.plan(spec)
        self.holds = self._inner.holds

    def open(self) -> None:
        """Open the sink."""
        if self.device != CPU:
            import_cupy(self.device)
        self._inner.open()

    def write(self, frame: Frame) -> None:
        """Let the sink take one frame."""
        self._inner.write(frame)

    def finish(self) -> None:
        """Complete the sink."""
        self._inner.finish()

    def close(self) -> None:
        """Close the sink."""
        self._inner.close()

    def report(self) -> dict[str, Any]:
        """Return the sink's report."""
        return self._inner.report()


class _Meter(Around):
    """Another sink, with a clock on it."""

    def __init__(self, inner: Sink) -> None:
        super().__init__(inner)
        self.keep: list[Frame] = []
        self.keeping = 0
        self.done = threading.Event()
        self.detailed = False
        self._seen = self._lead = self._goal = 0
        self.begin = self.end = Moment(0.0)

    def expect(self, lead: int, goal: int, detailed: bool) -> None:
        self._seen, self._lead, self._goal = 0, lead, goal
        self.detailed = detailed
        self.done.clear()

    def write(self, frame: Frame) -> None:
        if self.keeping:
            self.keeping -= 1
            self.keep.append(copied(frame))
        self._inner.write(frame)
        self._seen += 1
        if self._seen == self._lead:
            details = self._details() if self.detailed else {}
            self.begin = Moment(self.clock.now_s(), **details)
        elif self._seen == self._goal:
            self.end = Moment(self.clock.now_s())
            if self.detailed:
                self.end = replace(self.end, **self._details())
            self.done.set()

    def _details(self) -> dict[str, Any]:
        pool: dict[str, int] = {}
        if self.device != CPU:
            cupy = import_cupy()
            memory = cupy.get_default_memory_pool()
            pool = {
                "used_bytes": memory.used_bytes(),
                "total_bytes": memory.total_bytes(),
                "free_blocks": memory.n_free_blocks(),
                "pinned_free_blocks": cupy.get_default_pinned_memory_pool().n_free_blocks(),
            }
        return {"pool": pool, "waits": dict(host_waits.by_thread)}


def copied(frame: Frame) -> Frame:
    """Return a copy of a frame in memory of its own, ready to be read; waits for the frame."""
    frame.synchronize()
    if frame.spec.device == CPU:
        return frame.replace([np.array(plane) for plane in frame.planes], frame.spec)
    cupy = import_cupy(frame.spec.device)
    result = frame.replace([plane.copy() for plane in frame.planes], frame.spec)
    cupy.cuda.get_current_stream().synchronize()
    return result


def on_host(frame: Frame) -> Frame:
    """Return a copy of a ready frame in host memory."""
    if frame.spec.device == CPU:
        return frame
    planes = [plane.get() for plane in frame.planes]
    return frame.replace(planes, replace(frame.spec, device=CPU))


def thread_times() -> dict[str, float]:
    """Return processor seconds by thread name; of a thread that Python does not know, "other"."""
    names = {t.native_id: t.name for t in threading.enumerate()}
    times: dict[str, float] = {}
    for thread in psutil.Process().threads():
        name = names.get(thread.id, "other")
        times[name] = times.get(name, 0.0) + thread.user_time + thread.system_time
    return times


class Rig:
    """A pipeline of one chain, open and waiting for bursts.

    Args:
        name: for messages and profiles.
        source: where frames come from.
        stages: what they go through.
        sink: where they go.
        tracer: keeps a profile.

    Raises:
        VidpipeError: it cannot be planned.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        stages: Sequence[Stage],
        sink: Sink,
        tracer: Tracer | None = None,
    ) -> None:
        self.name = name
        self.stages = list(stages)
        self._source = _Bursts(source)
        self._meter = _Meter(sink)
        graph = Graph(name).add("source", self._source)
        last = "source"
        for number, stage in enumerate(stages, 1):
            graph.add(f"stage{number}", stage, last)
            last = f"stage{number}"
        graph.add("sink", self._meter, last)
        gate = StartGate()
        self.pipeline = Pipeline(graph, gate=gate, tracer=tracer)
        try:
            self.pipeline.start()
            # One rig opens at a time: no frames flow while CUDA graphs are captured.
            gate.wait()
        except BaseException:
            self.pipeline.abort()
            raise

    def burst(self, frames: int, *, detailed: bool = False) -> Burst:
        """Run a lead-in, then so many frames more, and time these.

        Both are whole bundles, where frames go in such: a part of one would come late.

        Raises:
            VidpipeError: a stage failed.
        """
        bundle = self._source.bundle
        lead = -(-min(LEAD_IN, max(1, frames // 3)) // bundle) * bundle
        frames = -(-frames // bundle) * bundle
        every = lead + frames
        self._meter.expect(lead, every, detailed)
        before = thread_times() if detailed else {}
        begin_s = processor_s()
        self._source.give(every)
        while not self._meter.done.wait(0.1):
            self._check()
        used_s = processor_s() - begin_s
        after = thread_times() if detailed else {}
        return Burst(
            frames,
            self._meter.begin,
            self._meter.end,
            used_s / every,
            {name: (at_s - before.get(name, 0.0)) / every for name, at_s in after.items()},
        )

    def _check(self) -> None:
        if self.pipeline.error is not None:
            self.pipeline.wait()
            raise self.pipeline.error

    def keep(self, frames: int) -> list[Frame]:
        """Run so many frames and return copies of what reached the sink."""
        self._meter.keep, self._meter.keeping = [], frames
        self.burst(max(1, frames - 1))
        return self._meter.keep[:frames]

    def close(self) -> Report:
        """End the pipeline and return its report.

        Raises:
            VidpipeError: a stage failed.
        """
        self.pipeline.stop()
        self.pipeline.wait()
        return self.pipeline.report()

    def abort(self) -> None:
        """End the pipeline at once; what it wrote is gone."""
        self.pipeline.abort()
        self.pipeline.wait()


def close_all(rigs: Sequence[Rig]) -> None:
    """Abort every rig that still runs."""
    for rig in rigs:
        if not rig.pipeline.wait(0):
            rig.abort()
