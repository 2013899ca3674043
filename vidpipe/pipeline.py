"""Runs a graph: one thread a stage, bounded links, one supervisor.

    pipeline = Pipeline(graph)
    report = pipeline.run()

`plan` walks the graph and gives every link its FrameSpec before anything starts. Where a stage
takes frames on another device than they are on, it puts a transfer between. Every stage is
open before a source gives its first frame, so all memory is allocated by then. The first
error stops everything and is raised with the name of its stage and the media time. `stop`
ends the sources and lets the rest drain, so that outputs are complete up to that point;
`abort` drops what is in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from vidpipe import trace
from vidpipe.clock import Clock, MonotonicClock
from vidpipe.device import CPU, Device, available_bytes, slot_bytes
from vidpipe.errors import Cancelled, SpecError, VidpipeError
from vidpipe.frame import FrameSpec
from vidpipe.graph import Graph, Node
from vidpipe.link import Link, Policy
from vidpipe.runner import Runner, StageReport
from vidpipe.stage import Actor, Sink, Source, Stage
from vidpipe.transfer import Transfer

# A frame on a GPU takes a stage about 0.1 ms of the host's time, and half as much again where the
# stage was asleep until then.
_BUNDLES = (8, 4)
_BUNDLES_SHARE = 4  # the part of the available memory that rings may take for it


@dataclass(slots=True)
class Report:
    """What a run did.

    Attributes:
        outcome: "complete", or "stopped" when the user ended it early.
        wall_s: from start to the last close.
        first_frame_s: from start until the first frame reached a sink, or None.
        media_s: media time covered by the frames that reached the sinks.
        stages: in the order of the graph.
        notes: what the user should know, one line each.
        problems: what does not add up, one line each; empty after a sound run.
    """

    outcome: str
    wall_s: float
    first_frame_s: float | None
    media_s: float
    stages: list[StageReport]
    notes: list[str]
    problems: list[str]

    @property
    def slowest(self) -> StageReport | None:
        """The stage that bounds the rate, or None when nothing ran."""
        return slowest_stage(self.stages)

    def stage(self, name: str) -> StageReport:
        """Return the report of one stage."""
        return next(s for s in self.stages if s.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-compatible values."""
        return asdict(self)


def slowest_stage(stages: Iterable[StageReport]) -> StageReport | None:
    """Return the stage that bounds the rate, or None when nothing ran."""
    return min((s for s in stages if s.fps), key=lambda s: s.fps or 0.0, default=None)


class StartGate:
    """Holds every source back until all stages, of one or several pipelines, are open.

    What a stage allocates or captures on a GPU while it opens must not meet another's frames.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = 0
        self._aborted = False

    def expect(self, stages: int) -> None:
        """Wait for so many stages more."""
        with self._changed:
            self._waiting += stages

    def arrive(self) -> None:
        """Say that one of them is open, or will never be."""
        with self._changed:
            self._waiting -= 1
            self._changed.notify_all()

    def abort(self) -> None:
        """Let everybody pass."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all stages are open."""
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._waiting <= 0)


def _ring_bytes(runners: Iterable[Runner], specs: dict[str, FrameSpec]) -> int:
    """Return the size of the rings of sources and stages."""
    total = 0
    for runner in runners:
        spec = specs[runner.node.name]
        shapes = [(shape, spec.format.dtype) for shape in spec.plane_shapes()]
        total += runner.actor.ring_depth * slot_bytes(shapes)
    return total


def _link(writer: Actor, reader: Actor, capacity: int, clock: Clock) -> Link:
    """Return the link between two actors; at the ends of a live graph the latest frame wins."""
    policy = writer.policy if isinstance(writer, Source | Transfer) else Policy.BLOCK
    if isinstance(reader, Sink) and reader.policy is Policy.LATEST:
        policy = Policy.LATEST
    return Link(reader.capacity or capacity, policy, clock, reader.stale)


class _Run(Protocol):
    def start(self) -> None: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def abort(self) -> None: ...
    def report(self) -> Report: ...


_R = TypeVar("_R", bound=_Run)


def drive(run: _R, progress: Callable[[_R], None] | None) -> Report:
    """Start a run, wait for its end, and report; an exception meanwhile aborts it."""
    run.start()
    try:
        # A join without a timeout cannot be interrupted on Windows.
        while not run.wait(0.2):
            if progress is not None:
                progress(run)
    except BaseException:
        run.abort()
        run.wait()
        raise
    return run.report()


class Pipeline:
    """A graph that can be run once.

    Args:
        graph: the stages; validated here.
        capacity: frames that may wait on each link; more where they go over a GPU in bundles.
        clock: source of all times.
        gate: shared with other pipelines that must open before this one's first frame.
        tracer: keeps a profile of the run.
        vram_limit: GPU memory that frames and models may take, in bytes; None for all that is
            free. What the driver and the decoder take by themselves comes on top.

    Raises:
        GraphError: the graph is wrong.
        VidpipeError: a stage cannot be made with its options.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        capacity: int = 2,
        clock: Clock | None = None,
        gate: StartGate | None = None,
        tracer: trace.Tracer | None = None,
        vram_limit: int | None = None,
    ) -> None:
        graph.validate()
        self.graph = graph
        self.capacity = capacity
        self.clock = clock or MonotonicClock()
        self.specs: dict[str, FrameSpec] = {}
        self.error: VidpipeError | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._aborted = False
        self._start_s = 0.0
        self._first_frame_s: float | None = None
        self._gate = gate or StartGate()
        self._tracer = tracer
        self._vram_limit = vram_limit
        self._notes: list[str] = []
        self._on_gpu = False
        self._runners: dict[str, Runner] = {}
        for node in graph.ordered():
            actor: Any = node.actor
            if actor is None:
                try:
                    actor = node.cls(**node.options)
                except VidpipeError as error:
                    raise error.at(node.name) from None
            actor.name = node.name
            actor.clock = self.clock
            runner = Runner(node, actor, self)
            if node.source is not None:
                writer = self._runners[node.source]
                runner.input = _link(writer.actor, actor, capacity, self.clock)
                writer.outputs.append(runner.input)
            self._runners[node.name] = runner

    def actor(self, name: str) -> Actor:
        """Return the source, stage or sink of that name."""
        return self._runners[name].actor

    def sources(self) -> list[Source]:
        """Return the sources."""
        return [r.actor for r in self._runners.values() if isinstance(r.actor, Source)]

    def plan(self) -> dict[str, FrameSpec]:
        """Give every link its FrameSpec; nothing is started.

        Returns:
            What comes out of each source and stage, by its name.

        Raises:
            VidpipeError: the first stage that cannot take what it would get.
        """
        if self.specs:
            return self.specs
        specs: dict[str, FrameSpec] = {}
        planned: dict[str, Runner] = {}
        moved: dict[tuple[str, Device], Runner] = {}
        name = ""
        try:
            for name, runner in self._runners.items():
                actor = runner.actor
                if isinstance(actor, Source):
                    specs[name] = actor.plan()
                    planned[name] = runner
                    continue
                assert runner.writer is not None
                source = self.actor(self.graph.root(name).name)
                assert isinstance(source, Source)
                actor.live = source.policy is Policy.LATEST
                if isinstance(actor, Sink):
                    actor.attach(source)
                spec = specs[runner.writer]
                target = actor.device_for(spec)
                if target != spec.device:
                    place = (runner.writer, target)
                    if place not in moved:
                        moved[place] = self._add_transfer(planned[runner.writer], spec, target)
                        planned[moved[place].node.name] = moved[place]
                    self._connect(moved[place], runner)
                    spec = specs[runner.writer] = replace(spec, device=target)
                runner.spec = spec
                if isinstance(actor, Stage):
                    specs[name] = actor.plan(spec)
                else:
                    actor.plan(spec)
                planned[name] = runner
            self._runners = planned
            self._on_gpu = any(spec.device != CPU for spec in specs.values())
            if self._on_gpu and self._vram_limit is None and all(s.bundles for s in self.sources()):
                self._bundle(specs)
            else:
                self._set_ring_depths()
            if self._vram_limit is not None:
                self._share_memory(specs, self._vram_limit)
        except BaseException as error:
            for runner in self._runners.values():
                runner.actor.close()
            if isinstance(error, VidpipeError):
                error.at(name)
            raise
        self.specs = specs
        return specs

    def _bundle(self, specs: dict[str, FrameSpec]) -> None:
        """Let frames go in bundles, where there is memory for the rings, which are longer then."""
        # While one bundle is read, the next can be made.
        for bundle in (*_BUNDLES, 1):
            capacity = self.capacity if bundle == 1 else max(self.capacity, 2 * bundle)
            for runner in self._runners.values():
                if isinstance(runner.actor, Source):
                    runner.actor.bundle = bundle
                if runner.input is not None and runner.actor.capacity is None:
                    runner.input.bundle, runner.input.capacity = bundle, capacity
            self._set_ring_depths()
            if all(
                _ring_bytes(rings, specs) <= available_bytes(device) // _BUNDLES_SHARE
                for device, rings in self._rings(specs).items()
            ):
                break

    def _rings(self, specs: dict[str, FrameSpec]) -> dict[Device, list[Runner]]:
        """Return by device the sources and stages whose rings are there."""
        found: dict[Device, list[Runner]] = {}
        for name, runner in self._runners.items():
            if name in specs:
                found.setdefault(specs[name].device, []).append(runner)
        return found

    def _set_ring_depths(self) -> None:
        """Give every ring a slot for each frame that can be on its way or is being made."""
        for runner in self._runners.values():
            actor = runner.actor
            if not isinstance(actor, Sink):
                made = actor.bundle if isinstance(actor, Source) else 1
                actor.ring_depth = made + sum(k.capacity + 1 for k in runner.outputs)
        for runner in self._runners.values():
            if runner.writer is not None:
                self._runners[runner.writer].actor.ring_depth += runner.actor.holds

    def _share_memory(self, specs: dict[str, FrameSpec], limit: int) -> None:
        """Divide GPU memory: first the rings, shorter ones where that helps, then the stages.

        Raises:
            SpecError: the frames alone need more.
        """
        found = self._rings(specs)
        found.pop(CPU, None)
        for gpu, rings in found.items():
            needed = _ring_bytes(rings, specs)
            if needed > limit // 2:
                for link in (link for runner in rings for link in runner.outputs):
                    link.capacity = 1
                self._set_ring_depths()
                before, needed = needed, _ring_bytes(rings, specs)
                if needed < before:
                    self._notes.append(
                        f"the rings of frames on {gpu} are shorter, {needed / 2**20:.0f} MiB "
                        f"instead of {before / 2**20:.0f}, for the memory limit of "
                        f"{limit / 2**20:.0f} MiB"
                    )
            if needed >= limit:
                raise SpecError(
                    f"the frames alone need {needed / 2**20:.0f} MiB on {gpu}, the limit is "
                    f"{limit / 2**20:.0f} MiB",
                    hint="Raise --vram-limit, or use --device cpu",
                )
            takers = [r.actor for r in rings if r.actor.takes_memory]
            for actor in takers:
                actor.memory_bytes = (limit - needed) // len(takers)

    def _add_transfer(self, writer: Runner, spec: FrameSpec, target: Device) -> Runner:
        """Return a transfer behind `writer`, with no readers yet."""
        name = f"{writer.node.name}-to-{target.kind}"
        actor = Transfer(device=str(target))
        actor.name, actor.clock = name, self.clock
        if isinstance(writer.actor, Source):
            actor.policy = writer.actor.policy
        actor.plan(spec)
        runner = Runner(Node(name, "transfer", writer.node.name, {}, actor), actor, self)
        runner.spec = spec
        runner.input = _link(writer.actor, actor, self.capacity, self.clock)
        writer.outputs.append(runner.input)
        return runner

    def _connect(self, writer: Runner, reader: Runner) -> None:
        """Let `reader` read from another writer than before."""
        assert reader.writer is not None
        before = self._runners[reader.writer]
        before.outputs = [link for link in before.outputs if link is not reader.input]
        reader.input = _link(writer.actor, reader.actor, self.capacity, self.clock)
        writer.outputs.append(reader.input)
        reader.writer = writer.node.name

    def start(self) -> None:
        """Plan, then start every stage's thread.

        Raises:
            VidpipeError: the plan fails; nothing was started.
        """
        self._start_s = self.clock.now_s()
        self.plan()
        if self._tracer is not None:
            self._trace(self._tracer)
        self._gate.expect(len(self._runners))
        for runner in self._runners.values():
            runner.thread.start()

    def _trace(self, tracer: trace.Tracer) -> None:
        """Give every actor a track."""
        group = tracer.group(self.graph.title or self.graph.origin)
        readers = {id(r.input): name for name, r in self._runners.items()}
        for name, runner in self._runners.items():
            runner.queues = [f"queue to {readers[id(link)]}" for link in runner.outputs]
            runner.track = tracer.track(group, name, runner.report.use, nvtx=self._on_gpu)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every stage has ended; return whether they have."""
        deadline_s = None if timeout_s is None else self.clock.now_s() + timeout_s
        for runner in self._runners.values():
            left_s = None if deadline_s is None else max(0.0, deadline_s - self.clock.now_s())
            runner.thread.join(left_s)
            if runner.thread.is_alive():
                return False
        return True

    def stop(self) -> None:
        """End the sources and let everything in flight drain into complete outputs."""
        self._stopping = True
        for source in self.sources():
            source.stop()

    def abort(self) -> None:
        """Drop what is in flight and stop every stage; outputs are not completed."""
        self._aborted = True
        self._gate.abort()
        self.stop()
        for runner in self._runners.values():
            if runner.input is not None:
                runner.input.close()

    def run(self, progress: Callable[[Pipeline], None] | None = None) -> Report:
        """Start, wait and report.

        Args:
            progress: called about five times a second while it runs.

        Raises:
            VidpipeError: the first error of any stage; everything has been closed.
        """
        return drive(self, progress)

    def report(self) -> Report:
        """Return what the ended run did.

        Raises:
            VidpipeError: the first error of any stage.
            Cancelled: the run was aborted.
        """
        wall_s = self.elapsed_s()
        if self.error is not None:
            raise self.error
        if self._aborted:
            raise Cancelled("stopped; nothing was kept")
        stages = self.progress()
        notes = list(self._notes)
        problems: list[str] = []
        for runner, stage in zip(self._runners.values(), stages, strict=True):
            stage.facts = runner.actor.report()
            notes += stage.facts.pop("notes", [])
            problems += stage.facts.pop("problems", [])
            if runner.writer is not None:
                given = self._runners[runner.writer].report.frames_out
                if stage.frames_in + stage.dropped != given:
                    problems.append(
                        f"stage '{stage.name}' took {stage.frames_in} of the {given} frames "
                        f"that '{runner.writer}' gave"
                    )
        if self._tracer is not None:
            self._tracer.add_run(self.graph.title or self.graph.origin, stages)
        return Report(
            "stopped" if self._stopping else "complete",
            wall_s,
            self._first_frame_s,
            max(r.media_s for r in self._runners.values()),
            stages,
            notes,
            problems,
        )

    def progress(self) -> list[StageReport]:
        """Return the counters of every stage so far; may be called at any time."""
        reports = []
        for runner in self._runners.values():
            seen = runner.report
            frames = seen.frames_in or seen.frames_out
            busy_s = seen.busy_s + runner.actor.aside_s
            link = runner.input.statistics() if runner.input else None
            waited_out = sum(link.statistics().writer_waited_s for link in runner.outputs)
            reports.append(
                StageReport(
                    seen.name,
                    seen.use,
                    seen.frames_in,
                    seen.frames_out,
                    link.dropped if link else 0,
                    busy_s,
                    seen.open_s,
                    frames / busy_s if frames and busy_s > 0 else None,
                    link.reader_waited_s if link else 0.0,
                    waited_out,
                )
            )
        return reports

    def elapsed_s(self) -> float:
        """Return seconds since the start."""
        return self.clock.now_s() - self._start_s

    def written(self) -> tuple[int, float]:
        """Return (frames, media time in seconds) that every sink has taken so far."""
        sinks = [r for r in self._runners.values() if isinstance(r.actor, Sink)]
        return min(r.report.frames_in for r in sinks), min(r.media_s for r in sinks)

    def _fail(self, error: VidpipeError) -> None:
        with self._lock:
            if self.error is None:
                self.error = error
        self.abort()

    def _first_frame(self) -> None:
        with self._lock:
            if self._first_frame_s is None:
                self._first_frame_s = self.clock.now_s() - self._start_s
