"""One file on several devices, or on several decoders of one.

The file is cut at key frames. Every worker is a pipeline of its own that takes the next part,
decodes, enhances and encodes it; the packets of the parts are joined in order, with everything
that is not the picture. Frames, timestamps and streams are those of a run on one device.

    report = run_split(graph, [Device("cuda", 0), Device("cuda", 1)])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from vidpipe.clock import Clock, MonotonicClock
from vidpipe.device import Device, import_cupy
from vidpipe.errors import Cancelled, DeviceError, GraphError, InputError, VidpipeError
from vidpipe.graph import Graph, Node
from vidpipe.link import LinkClosed
from vidpipe.pipeline import Pipeline, Report, StartGate, drive
from vidpipe.runner import StageReport
from vidpipe.stage import Null, Sink, Source, options_of

SPLITTABLE = frozenset({"decode", "encode", "function", "model", "null", "resize"})
"""Stages that treat each frame by itself, so that it does not matter which ones came before."""


def run_split(
    graph: Graph,
    devices: Sequence[Device],
    *,
    decoders: int | None = 1,
    progress: Callable[[SplitRun], None] | None = None,
) -> Report:
    """Run a graph from one file to another, or to nothing, on several devices.

    Args:
        graph: one decode stage, one encode or null stage, and between them stages of
            `SPLITTABLE`.
        devices: where the workers run; the device of every stage that has one is set to its
            worker's, unless it is set to another kind, such as "cpu".
        decoders: workers on each device; None for as many as a short measurement finds worth
            it, see `vidpipe.decoders`.
        progress: called about five times a second while it runs.

    Raises:
        VidpipeError: nothing is left under the name of the destination.
    """
    return SplitRun(graph, devices, decoders=decoders).run(progress)


def devices_of(text: str) -> list[Device]:
    """Return the devices that "cuda:all" or "cuda:0,cuda:1" names; none for anything else.

    Raises:
        MissingExtraError: CuPy is not installed.
        DeviceError: there is no such device, or a list names something else than GPUs.
    """
    if text == "cuda:all":
        cupy = import_cupy(Device("cuda", 0))
        return [Device("cuda", i) for i in range(cupy.cuda.runtime.getDeviceCount())]
    if "," not in text:
        return []
    devices = [Device.parse(part.strip()) for part in text.split(",")]
    if any(device.kind != "cuda" for device in devices):
        raise DeviceError(
            f"'{text}' is not a list of GPUs", hint="Use cuda:all, or such as cuda:0,cuda:1"
        )
    for device in devices:
        import_cupy(device)
    return devices


class SplitRun:
    """A graph that can be run once, in parts, on several devices; used like a `Pipeline`.

    What cannot be cut (a file with one key frame, pictures to deinterlace) runs on the first
    device, and a note in the report says why.

    Args:
        graph, devices, decoders: see `run_split`.
        least_s: media time of a part, at least, in seconds; by default 2 to 10.
        clock: source of all times.
        options: more arguments of `Pipeline`, such as `tracer`.

    Attributes:
        devices: one for each worker; after `plan`, where that chooses how many.
        notes: why the file was not split, and what was measured, after `plan`.

    Raises:
        GraphError: the graph is wrong, or not one that can be split.
        InputError: there are no devices.
    """

    def __init__(
        self,
        graph: Graph,
        devices: Sequence[Device],
        *,
        decoders: int | None = 1,
        least_s: float | None = None,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        if not devices or (decoders is not None and decoders < 1):
            raise InputError(f"{len(devices)} devices with {decoders} decoders each")
        graph.validate()
        self.graph = graph
        self.clock = clock or MonotonicClock()
        self.devices = [device for device in devices for _ in range(decoders or 1)]
        self._measured = decoders is not None
        self._least_s = least_s
        self._options = options
        self._decode, self._sink = _ends(graph)
        self._gate = StartGate()
        self._pipelines: list[Pipeline] = []
        self._part_sinks: list[Sink] = []
        self._join: _Join | None = None
        self.notes: list[str] = []
        self._error: VidpipeError | None = None
        self._start_s = 0.0
        self._stopping = self._aborted = False

    @property
    def error(self) -> VidpipeError | None:
        """The first error of any worker, or None."""
        errors = (p.error for p in self._pipelines)
        return self._error or next((e for e in errors if e is not None), None)

    def plan(self) -> None:
        """Cut the file and plan every worker; nothing is started.

        Raises:
            VidpipeError: see `Pipeline.plan`.
        """
        if self._pipelines:
            return
        from vidpipe.media.decode import Decode
        from vidpipe.media.ranges import LONGEST_S, SHORTEST_S, Schedule, cut, starts_clean

        head = Decode(**{**self._decode.options, "device": "cpu"})
        head.name = self._decode.name
        try:
            head.plan()
        except VidpipeError as error:
            raise error.at(head.name) from None
        assert head.info is not None
        length_s = head.expected_s or 0.0
        interlaced = head.deinterlace == "auto" and head.info.video.interlaced
        deinterlaced = interlaced or head.deinterlace == "always"
        if not self._measured and not deinterlaced:
            self._choose_decoders(head)
        workers = len(self.devices)
        least_s = self._least_s or min(max(length_s / (4 * workers), SHORTEST_S), LONGEST_S)
        segments = cut(head, least_s)
        first = list(islice(segments, 2))
        why = ""
        if workers > 1:
            if deinterlaced:
                why = "its pictures are deinterlaced, which looks at their neighbours"
            elif len(first) < 2:
                why = f"it has no key frames {least_s:.3g} s apart to cut at"
            elif not starts_clean(head, first[1]):
                why = "its key frames do not decode without what comes before"
        if why or workers == 1:
            if why:
                self.notes.append(f"'{head.path}' was not split: {why}")
            graph = self._copy(self.devices[0], self._decode, self._sink)
            pipelines = [Pipeline(graph, clock=self.clock, **self._options)]
        else:
            schedule = Schedule(chain(first, segments), 2 * workers)
            self._join = _Join(self, head, schedule)
            pipelines = [self._worker(device, schedule) for device in self.devices]
        for pipeline in pipelines:
            pipeline.plan()
        if self._join is not None:
            self._join.plan(pipelines)
        self._pipelines = pipelines

    def _worker(self, device: Device, schedule: Any) -> Pipeline:
        from vidpipe.media.ranges import RangeDecode

        decode, sink = self._decode, self._sink
        reader = RangeDecode(schedule=schedule, **_placed(decode, device))
        writer = self._part_sink(schedule)
        self._part_sinks.append(writer)
        graph = self._copy(
            device,
            Node(decode.name, "", None, {}, reader),
            Node(sink.name, "", sink.source, {}, self._around(writer)),
        )
        return Pipeline(graph, clock=self.clock, gate=self._gate, **self._options_on(device))

    def _part_sink(self, schedule: Any) -> Sink:
        """Return what takes a worker's parts."""
        from vidpipe.media.join import PartEncode, PartSink

        if self._sink.use == "encode":
            return PartEncode(schedule=schedule, **self._sink.options)
        return PartSink(Null(), schedule)

    def _around(self, sink: Sink) -> Sink:
        """Return the sink of a worker's pipeline; one that measures can put itself around it."""
        return sink

    def _choose_decoders(self, head: Any) -> None:
        """Give each device as many workers as a measurement finds worth it."""
        from vidpipe.decoders import choose

        self._measured = True
        if self._options.get("vram_limit") is not None:
            return  # a second model would halve what each may take
        graph = self._copy(self.devices[0])
        count, note = choose(graph, self._decode.name, self._sink.name, head, self.clock)
        self.devices = [device for device in self.devices for _ in range(count)]
        self.notes += [note] if note else []

    def _options_on(self, device: Device) -> dict[str, Any]:
        """Return the options of a pipeline, which shares its device's memory with others."""
        options = dict(self._options)
        if options.get("vram_limit") is not None:
            options["vram_limit"] //= self.devices.count(device)
        return options

    def _copy(self, device: Device, *ends: Node) -> Graph:
        """Return the graph with every stage on a device, and with these ends."""
        graph = Graph(f"{self.graph.title or self.graph.origin} on {device}", self.graph.origin)
        given = {node.name: node for node in ends}
        for name, node in self.graph.nodes.items():
            node = given.get(name, node)
            if node.actor is None:
                node = replace(node, options=_placed(node, device))
            graph.nodes[name] = node
        return graph

    def sources(self) -> list[Source]:
        """Return the source of the whole file."""
        return [self._join.head] if self._join is not None else self._pipelines[0].sources()

    def start(self) -> None:
        """Plan, then start every worker.

        Raises:
            VidpipeError: the plan fails; nothing was started.
        """
        self._start_s = self.clock.now_s()
        self.plan()
        if self._stopping:  # somebody asked while the file was planned
            self.stop()
        # No worker may begin before all are known to the gate.
        self._gate.expect(1)
        for pipeline in self._pipelines:
            pipeline.start()
        if self._join is not None:
            self._join.thread.start()
        self._gate.arrive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every worker has ended; return whether they have."""
        deadline_s = None if timeout_s is None else self.clock.now_s() + timeout_s
        for pipeline in self._pipelines:
            left_s = None if deadline_s is None else max(0.0, deadline_s - self.clock.now_s())
            if not pipeline.wait(left_s):
                return False
        if self._join is None:
            return True
        left_s = None if deadline_s is None else max(0.0, deadline_s - self.clock.now_s())
        self._join.thread.join(left_s)
        return not self._join.thread.is_alive()

    def stop(self) -> None:
        """Begin no more parts, and complete the output up to there."""
        self._stopping = True
        if self._join is None:
            for pipeline in self._pipelines:
                pipeline.stop()
        else:
            self._join.schedule.stop()

    def abort(self) -> None:
        """Drop what is in flight and stop every worker; the output is not completed."""
        self._aborted = True
        if self._join is not None:
            self._join.schedule.abort()
        for pipeline in self._pipelines:
            pipeline.abort()

    def run(self, progress: Callable[[SplitRun], None] | None = None) -> Report:
        """Start, wait and report.

        Args:
            progress: called about five times a second while it runs.

        Raises:
            VidpipeError: the first error of any worker; everything has been closed.
        """
        return drive(self, progress)

    def elapsed_s(self) -> float:
        """Return seconds since the start."""
        return self.clock.now_s() - self._start_s

    def written(self) -> tuple[int, float]:
        """Return (frames, media time in seconds) that the workers have encoded so far."""
        if self._join is None:
            return self._pipelines[0].written()
        frames = sum(pipeline.written()[0] for pipeline in self._pipelines)
        return frames, sum(s.counts.duration_s for s in list(self._join.schedule.taken))

    def progress(self) -> list[StageReport]:
        """Return the counters of every stage so far, all workers together."""
        if self._join is None:
            return self._pipelines[0].progress()
        return self._merged([p.progress() for p in self._pipelines])

    def report(self) -> Report:
        """Return what the ended run did; stages as in the graph, all workers together.

        Each stage's facts hold "workers", a list with the device and the rate of each.

        Raises:
            VidpipeError: the first error of any worker.
            Cancelled: the run was aborted.
        """
        if self.error is not None:
            raise self.error
        if self._aborted:
            raise Cancelled("stopped; nothing was kept")
        reports = [p.report() for p in self._pipelines]
        if self._join is None:
            report = reports[0]
            report.notes = [*self.notes, *report.notes]
            return report
        stages = self._merged([r.stages for r in reports])
        notes = list(dict.fromkeys([*self.notes, *(n for r in reports for n in r.notes)]))
        problems = list(dict.fromkeys(n for r in reports for n in r.problems))
        for stage in stages:
            own = self._join.facts(stage.name)
            notes += own.pop("notes", [])
            problems += own.pop("problems", [])
            stage.facts = {**stage.facts, **own}
        notes.append(
            f"{len(self._join.schedule.taken)} parts on "
            + ", ".join(str(device) for device in self.devices)
        )
        firsts = [r.first_frame_s for r in reports if r.first_frame_s is not None]
        return Report(
            "stopped" if self._stopping else "complete",
            self.elapsed_s(),
            min(firsts, default=None),
            self._join.head.counts.duration_s,
            stages,
            notes,
            problems,
        )

    def _merged(self, workers: list[list[StageReport]]) -> list[StageReport]:
        merged = []
        for reports in zip(*workers, strict=True):
            first = reports[0]
            for pipeline, report in zip(self._pipelines, reports, strict=True):
                waited_s = getattr(pipeline.actor(first.name), "waited_s", 0.0)
                report.busy_s -= waited_s  # a decoder waits for its next part
                frames = report.frames_in or report.frames_out
                report.fps = frames / report.busy_s if frames and report.busy_s > 0 else None
            rates = [r.fps for r in reports if r.fps]
            node = self.graph.nodes.get(first.name)
            merged.append(
                StageReport(
                    first.name,
                    node.use if node is not None else first.use,
                    sum(r.frames_in for r in reports),
                    sum(r.frames_out for r in reports),
                    sum(r.dropped for r in reports),
                    sum(r.busy_s for r in reports),
                    max(r.open_s for r in reports),
                    sum(rates) if rates else None,
                    sum(r.waited_for_input_s for r in reports),
                    sum(r.waited_for_output_s for r in reports),
                    {**first.facts, "workers": [*map(_worker_facts, self.devices, reports)]},
                )
            )
        return merged

    def _fail(self, error: VidpipeError) -> None:
        self._error = self._error or error


def _worker_facts(device: Device, report: StageReport) -> dict[str, Any]:
    return {
        "device": str(device),
        "frames": report.frames_in or report.frames_out,
        "busy_s": report.busy_s,
        "fps": report.fps,
    }


class _Join:
    """The thread that puts the parts together, and what it knows of the whole file."""

    def __init__(self, run: SplitRun, head: Any, schedule: Any) -> None:
        from vidpipe.media.join import JoinEncode

        self.run = run
        self.head = head
        self.schedule = schedule
        self.name = run._sink.name
        self.sink: JoinEncode | None = None  # of parts that go to no file
        if run._sink.use == "encode":
            self.sink = JoinEncode(**run._sink.options)
            self.sink.name = self.name
        self._readers: list[Any] = []
        self._pipelines: list[Pipeline] = []
        self.thread = threading.Thread(target=self._run, name="vidpipe-join")

    def plan(self, pipelines: list[Pipeline]) -> None:
        """Plan the output as the workers' encoders were planned.

        Raises:
            OutputError, SpecError: it cannot be written.
            InputError: the devices encode differently.
        """
        self._pipelines = pipelines
        self._readers = [p.actor(self.head.name) for p in pipelines]
        if self.sink is None:
            return
        sinks: list[Any] = self.run._part_sinks
        if any(sink.choice != sinks[0].choice for sink in sinks):
            names = dict.fromkeys(sink.choice[0] for sink in sinks)
            raise InputError(
                f"the devices encode differently ({', '.join(names)}), so their parts do not fit",
                hint="Use --codec with one encoder that all have, such as libx264",
            )
        try:
            self.sink.attach(self.head)
            self.sink.adopt(sinks[0])
            self.sink.plan(sinks[0].spec)
        except VidpipeError as error:
            raise error.at(self.sink.name) from None

    def facts(self, name: str) -> dict[str, Any]:
        """Return what a stage's report says of the whole file."""
        if name == self.name:
            return self.sink.report() if self.sink is not None else {}
        if name != self.head.name:
            return {}
        facts: dict[str, Any] = self.head.report()
        places = dict.fromkeys(reader.report()["decoded_on"] for reader in self._readers)
        facts["decoded_on"] = ", ".join(places)
        if facts["decoded_on"] != "cpu":
            facts["summary"] += f" on {facts['decoded_on']}"
        return facts

    def _run(self) -> None:
        from vidpipe.media.ranges import add_counts

        counts = self.head.counts
        try:
            for segment, packets, facts in self.schedule.parts():
                if segment.counts.jumps:
                    counts.jumps = segment.counts.jumps
                if self.sink is not None:
                    self.sink.join(packets, facts)
                if facts is not None:
                    add_counts(counts, segment.counts)
            counts.stopped = self.run._stopping
            if self.sink is not None:
                self.sink.finish()
        except LinkClosed:
            self._abort()
        except VidpipeError as error:
            self.run._fail(error.at(self.name))
            self._abort()
        except BaseException as error:
            wrapped = VidpipeError(f"{type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self.run._fail(wrapped.at(self.name))
            self._abort()
        finally:
            if self.sink is not None:
                self.sink.close()
            self.schedule.close()

    def _abort(self) -> None:
        self.schedule.abort()
        for pipeline in self._pipelines:
            pipeline.abort()


def _ends(graph: Graph) -> tuple[Node, Node]:
    """Return the decode stage and the encode or null stage of a graph that can be split.

    Raises:
        GraphError: it cannot.
    """
    for node in graph.nodes.values():
        if node.actor is not None or node.use not in SPLITTABLE:
            what = node.use or type(node.actor).__name__
            raise GraphError(
                f"{graph.origin}: stage '{node.name}' ({what}) cannot be split over devices",
                hint="Use one device; known to split: " + ", ".join(sorted(SPLITTABLE)),
            )
    sources, sinks = graph.using("decode"), [*graph.using("encode"), *graph.using("null")]
    if len(sources) != 1 or len(sinks) != 1:
        raise GraphError(
            f"{graph.origin} has {len(sources)} decode stages and {len(sinks)} that encode or "
            "take nothing; one of each can be split over devices",
            hint="Use one device",
        )
    return sources[0], sinks[0]


def _placed(node: Node, device: Device) -> dict[str, Any]:
    """Return a stage's options with its device, unless it is to be somewhere else."""
    options = dict(node.options)
    given = str(options.get("device", "auto"))
    if "device" in options_of(node.cls) and (given == "auto" or given.startswith("cuda")):
        options["device"] = str(device)
    return options
