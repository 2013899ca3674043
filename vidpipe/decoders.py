"""How many decoders of a GPU a file is worth: by measuring, for a moment, before the run.

A GPU has several NVDEC engines, and one file keeps one of them busy. Where that is slower than
the models are, several workers with a decoder each make up for it. A second worker takes a
second copy of the models in memory, so it has to pay.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import ceil
from typing import Any

from vidpipe.clock import Clock
from vidpipe.device import CPU, Device, import_cupy
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph, Node
from vidpipe.pipeline import Pipeline, StartGate
from vidpipe.stage import FrameSource, Null, Source

MOST = 4
"""Workers on one GPU, at most."""

WORTH_FRAMES = 3000
"""A shorter file is done before a second decoder has made up for the measurement."""

SPARE = 1.1
"""How much faster the decoders should be alone than the models: beside these they are slower."""

_MEASURED_S = 0.4
_LEAD_IN = 16
_KEPT = 4


def choose(graph: Graph, source: str, sink: str, head: Any, clock: Clock) -> tuple[int, str]:
    """Return how many decoders of its GPU a graph is worth, and why, in a line.

    One, where the frames are decoded by the CPU, or encoded by it: then that is the bound.
    Else `SPARE` times the models' rate over the decoder's, rounded up, as far as so many decoders
    really are that much faster than one: a chip with a single engine gains nothing.

    Args:
        graph: a chain from the decode stage `source` to an encode or null stage `sink`, its
            stages set to one GPU.
        head: the planned decode stage of the same file.
        clock: what to measure with.

    Raises:
        VidpipeError: a stage cannot be planned or run.
    """
    expected = head.expected_frames
    if expected is not None and expected < WORTH_FRAMES:
        return 1, ""
    sample = Sample(graph, source, sink, clock)
    if not sample.on_gpu(head):
        return 1, ""
    try:
        return _decide(sample)
    finally:
        sample.close()


def _decide(sample: Sample) -> tuple[int, str]:
    decode = sample.decode(1)
    if not decode:
        return 1, ""
    models = sample.models()
    if models == 0:
        return 1, ""
    note = f"decode {decode:.0f} fps, "
    note += "no models: " if models is None else f"models {models:.0f} fps: "
    decoders = wanted(decode, models)
    if decoders == 1:
        return 1, f"{note}1 decoder on each GPU"
    faster = round(sample.decode(decoders) / decode)
    decoders = max(1, min(decoders, faster))
    if decoders == 1:
        return 1, f"{note}1 decoder on each GPU, for several are no faster"
    return decoders, f"{note}{decoders} decoders on each GPU"


def wanted(decode_fps: float, models_fps: float | None) -> int:
    """Return how many decoders keep the models busy; `MOST` where there are none (None)."""
    if models_fps is None:
        return MOST
    return min(max(ceil(SPARE * models_fps / decode_fps), 1), MOST)


class Sample:
    """A graph's decoder and its other stages, each run alone for a moment.

    Args:
        graph, source, sink, clock: see `choose`.
    """

    def __init__(self, graph: Graph, source: str, sink: str, clock: Clock) -> None:
        self._graph, self._source, self._sink = graph, source, sink
        self._clock = clock
        self._kept: list[Frame] = []

    def on_gpu(self, head: Any) -> bool:
        """Return whether the GPU decodes the file, and frames stay there to their end.

        Raises:
            VidpipeError: a stage cannot be planned.
        """
        source: Any = self._graph.nodes[self._source]
        decode = source.cls(**source.options)
        spec: FrameSpec = decode.plan()
        if spec.device == CPU or not decode.in_hardware:
            return False
        for node in self._between():
            stage: Any = node.cls(**node.options)
            if stage.device_for(spec) != spec.device:
                return False
            spec = stage.plan(spec)
        node = self._graph.nodes[self._sink]
        sink: Any = node.cls(**node.options)
        sink.attach(head)
        place: Device = sink.device_for(spec)
        return place == spec.device

    def _between(self) -> list[Node]:
        ends = (self._source, self._sink)
        return [node for node in self._graph.ordered() if node.name not in ends]

    def decode(self, decoders: int) -> float:
        """Return frames per second of so many decoders at once, all together; 0 of too few.

        Raises:
            VidpipeError: a stage fails.
        """
        node = self._graph.nodes[self._source]
        timers = [Timer(self._clock, _KEPT) for _ in range(decoders)]
        graphs = []
        for timer in timers:
            graph = Graph("decode").add(node.name, node.use, **node.options)
            graphs.append(graph.add("timer", timer, node.name))
        fps = _run(graphs, timers, self._clock)
        self._kept = timers[0].kept
        return fps

    def models(self) -> float | None:
        """Return frames per second of the stages between, after `decode`.

        None without any; 0 where too few frames came to tell.

        Raises:
            VidpipeError: a stage fails.
        """
        nodes = self._between()
        if not nodes:
            return None
        timer = Timer(self._clock)
        source = FrameSource(self._kept[0].spec, _over_and_over(self._kept))
        graph = Graph("models").add(self._source, source)
        for node in nodes:
            graph.add(node.name, node.use, node.source, **node.options)
        graph.add("timer", timer, nodes[-1].name)
        return _run([graph], [timer], self._clock)

    def close(self) -> None:
        """Let go of the frames, and of the memory that the GPU keeps for more."""
        device = self._kept[0].spec.device if self._kept else CPU
        self._kept = []
        if device != CPU:
            import_cupy(device).get_default_memory_pool().free_all_blocks()


class Timer(Null):
    """Takes frames for a moment, then stops their source; knows how fast they came."""

    def __init__(self, clock: Clock, keep: int = 0) -> None:
        super().__init__()
        self._clock = clock
        self._source: Source | None = None
        self._keep = keep
        self.kept: list[Frame] = []
        self.begin_s: float | None = None
        self.end_s = 0.0
        self.frames = 0
        self._seen = 0

    @property
    def fps(self) -> float:
        """Frames per second; 0 of too few frames."""
        if self.begin_s is None or self.end_s <= self.begin_s:
            return 0.0
        return self.frames / (self.end_s - self.begin_s)

    def attach(self, source: Source) -> None:
        """Learn which source to stop."""
        self._source = source

    def plan(self, spec: FrameSpec) -> None:
        """Take anything."""
        super().plan(spec)
        self.holds += self._keep

    def write(self, frame: Frame) -> None:
        """Count the frame; the first ones are kept."""
        super().write(frame)
        now_s = self._clock.now_s()
        if len(self.kept) < self._keep:
            self.kept.append(frame)
        self._seen += 1
        if self._seen == _LEAD_IN:
            self.begin_s = now_s
        elif self.begin_s is not None:
            self.frames += 1
            self.end_s = now_s
            if now_s - self.begin_s >= _MEASURED_S and self._source is not None:
                self._source.stop()


def _over_and_over(frames: list[Frame]) -> Iterator[Frame]:
    step = frames[0].duration or 1
    for number in count():
        like = frames[number % len(frames)]
        yield Frame(like.planes, like.spec, number * step, duration=step)


def _run(graphs: list[Graph], timers: list[Timer], clock: Clock) -> float:
    """Run pipelines at once until their timers have seen enough; return the sum of their rates.

    Raises:
        VidpipeError: a stage fails; everything has been closed.
    """
    gate = StartGate()
    pipelines = [Pipeline(graph, clock=clock, gate=gate) for graph in graphs]
    begun = []
    try:
        for pipeline in pipelines:
            pipeline.plan()
        gate.expect(1)
        for pipeline in pipelines:
            begun.append(pipeline)
            pipeline.start()
        gate.arrive()
        for pipeline in pipelines:
            while not pipeline.wait(0.2):
                pass
    except BaseException:
        for pipeline in begun:
            pipeline.abort()
        for pipeline in begun:
            pipeline.wait()
        raise
    for pipeline in pipelines:
        if pipeline.error is not None:
            raise pipeline.error
    return sum(t.fps for t in timers)
