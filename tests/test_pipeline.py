"""Running graphs: order, branching, errors, stopping, reports."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from vidpipe.device import Device, Ring, Slot
from vidpipe.errors import Cancelled, SpecError, VidpipeError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.link import Policy
from vidpipe.pipeline import Pipeline
from vidpipe.stage import FrameSource, Sink, Source, Stage
from vidpipe.testing import Collect, Identity, ManualClock, pattern, patterns, spec

pytestmark = pytest.mark.usefixtures("no_leaks")


class Recorder(Identity):
    """Identity that keeps a diary and holds back one frame."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.held: Frame | None = None
        self.threads: set[int] = set()

    def plan(self, spec: FrameSpec) -> FrameSpec:
        self.diary.append(f"plan {spec.width}")
        return spec

    def open(self) -> None:
        self.diary.append("open")
        self.threads.add(threading.get_ident())

    def process(self, frame: Frame) -> Iterator[Frame]:
        self.threads.add(threading.get_ident())
        if self.held is not None:
            yield self.held
        self.held = frame

    def flush(self) -> Iterable[Frame]:
        self.diary.append("flush")
        held, self.held = self.held, None
        return [held] if held is not None else []

    def close(self) -> None:
        self.diary.append("close")


class Failing(Identity):
    def __init__(self, where: str, error: Exception) -> None:
        self.where = where
        self.error = error
        self.closed = 0

    def plan(self, spec: FrameSpec) -> FrameSpec:
        if self.where == "plan":
            raise self.error
        return spec

    def open(self) -> None:
        if self.where == "open":
            raise self.error

    def process(self, frame: Frame) -> Iterable[Frame]:
        if self.where == "process" and frame.pts == 5:
            raise self.error
        return (frame,)

    def flush(self) -> Iterable[Frame]:
        if self.where == "flush":
            raise self.error
        return ()

    def close(self) -> None:
        self.closed += 1
        if self.where == "close":
            raise self.error


class Endless(Source):
    """Frames until told to stop."""

    def __init__(self) -> None:
        self.spec = spec()
        self.stopped = threading.Event()
        self.closed = 0

    def plan(self) -> FrameSpec:
        return self.spec

    def frames(self) -> Iterator[Frame]:
        pts = 0
        while not self.stopped.is_set():
            yield pattern(self.spec, pts)
            pts += 1

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed += 1


class Signalling(Collect):
    """Tells when it has seen some frames."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.seen = threading.Event()

    def write(self, frame: Frame) -> None:
        super().write(frame)
        if len(self.frames) >= self.count:
            self.seen.set()


def test_every_frame_arrives_in_order_and_the_report_says_so() -> None:
    out = Collect()
    graph = Graph().add("in", patterns(30)).add("same", Identity(), "in").add("out", out, "same")
    report = Pipeline(graph).run()
    assert [f.pts for f in out.frames] == list(range(30))
    assert out.finished
    assert out.closed == 1
    assert report.outcome == "complete"
    assert report.problems == []
    assert [(s.frames_in, s.frames_out) for s in report.stages] == [(0, 30), (30, 30), (30, 0)]
    assert report.media_s == pytest.approx(30 / 25)
    assert report.first_frame_s is not None
    assert report.slowest is not None


def test_each_stage_has_one_thread_of_its_own_and_the_documented_order_of_calls() -> None:
    stages = [Recorder(), Recorder()]
    graph = Graph().add("in", patterns(4)).add("a", stages[0], "in").add("b", stages[1], "a")
    out = Collect()
    graph.add("out", out, "b")
    Pipeline(graph).run()
    for stage in stages:
        assert stage.diary == ["plan 64", "open", "flush", "close"]
        assert len(stage.threads) == 1
    assert stages[0].threads != stages[1].threads
    assert [f.pts for f in out.frames] == [0, 1, 2, 3]


def test_busy_time_is_the_stage_s_own_whether_it_returns_or_yields() -> None:
    clock = ManualClock()

    class Returns(Identity):
        def process(self, frame: Frame) -> Iterable[Frame]:
            clock.advance(2.0)
            return (frame,)

    class Yields(Identity):
        def process(self, frame: Frame) -> Iterable[Frame]:
            clock.advance(1.0)
            yield frame

    for stage, busy_s in ((Returns(), 2.0), (Yields(), 1.0)):
        graph = Graph().add("in", patterns(1)).add("work", stage, "in")
        graph.add("out", Collect(), "work")
        report = Pipeline(graph, clock=clock).run()
        assert report.stage("work").busy_s == busy_s
        assert report.stage("work").fps == pytest.approx(1 / busy_s)


def test_a_branch_gets_every_frame() -> None:
    one, two = Collect(), Collect()
    graph = Graph().add("in", patterns(20)).add("same", Identity(), "in")
    graph.add("one", one, "same").add("two", two, "in")
    Pipeline(graph, capacity=1).run()
    assert [f.pts for f in one.frames] == [f.pts for f in two.frames] == list(range(20))


def test_plan_names_every_link_before_anything_starts() -> None:
    class Halved(Identity):
        def plan(self, spec: FrameSpec) -> FrameSpec:
            return FrameSpec(width=spec.width // 2, height=spec.height // 2, format=spec.format)

    out = Collect()
    graph = Graph().add("in", patterns(1)).add("half", Halved(), "in").add("out", out, "half")
    pipeline = Pipeline(graph)
    specs = pipeline.plan()
    assert {name: s.width for name, s in specs.items()} == {"in": 64, "half": 32}
    assert [s.width for s in out.specs] == [32]
    assert not any(t.name.startswith("vidpipe-") for t in threading.enumerate())
    pipeline.run()


def test_ring_depth_covers_the_links_and_the_readers() -> None:
    stage = Identity()
    graph = Graph().add("in", patterns(1)).add("same", stage, "in")
    graph.add("one", Collect(), "same").add("two", Collect(), "same")
    Pipeline(graph, capacity=3).run()
    assert stage.ring_depth == 2 * (3 + 1) + 1


@pytest.mark.parametrize("where", ["open", "process", "flush", "close"])
def test_the_first_error_stops_everything_and_names_the_stage(where: str) -> None:
    bad = Failing(where, SpecError("too green", hint="Paint it"))
    source, out = Endless(), Signalling(3)
    graph = Graph().add("in", source).add("bad", bad, "in").add("out", out, "bad")
    pipeline = Pipeline(graph)
    if where in ("flush", "close"):
        pipeline.start()
        out.seen.wait(30)
        pipeline.stop()
        pipeline.wait()
        with pytest.raises(SpecError) as caught:
            pipeline.report()
    else:
        with pytest.raises(SpecError) as caught:
            pipeline.run()
    assert caught.value.stage == "bad"
    assert "stage 'bad'" in str(caught.value)
    assert str(caught.value).endswith("too green. Paint it")
    assert bad.closed == 1
    assert source.closed == 1
    assert out.closed == 1
    assert not out.finished
    if where == "process":
        assert caught.value.time_s == pytest.approx(5 / 25)


def test_an_unforeseen_error_is_wrapped_with_its_cause() -> None:
    bad = Failing("process", ZeroDivisionError("by zero"))
    graph = Graph().add("in", patterns(9)).add("bad", bad, "in").add("out", Collect(), "bad")
    with pytest.raises(VidpipeError, match=r"stage 'bad' at 0\.200 s: ZeroDivisionError") as caught:
        Pipeline(graph).run()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.exit_code == 1


def test_a_failed_plan_closes_what_was_planned() -> None:
    source = Endless()
    bad = Failing("plan", SpecError("no"))
    graph = Graph().add("in", source).add("bad", bad, "in").add("out", Collect(), "bad")
    with pytest.raises(SpecError, match="stage 'bad': no"):
        Pipeline(graph).run()
    assert source.closed == 1


def test_stop_drains_into_complete_outputs() -> None:
    source, recorder, out = Endless(), Recorder(), Signalling(10)
    graph = Graph().add("in", source).add("hold", recorder, "in").add("out", out, "hold")
    pipeline = Pipeline(graph)
    pipeline.start()
    assert out.seen.wait(30)
    pipeline.stop()
    assert pipeline.wait(30)
    report = pipeline.report()
    assert report.outcome == "stopped"
    assert out.finished
    assert [f.pts for f in out.frames] == list(range(report.stage("in").frames_out))
    assert report.problems == []


def test_abort_drops_what_is_in_flight() -> None:
    out = Signalling(1)
    graph = Graph().add("in", Endless()).add("out", out, "in")
    pipeline = Pipeline(graph)
    pipeline.start()
    assert out.seen.wait(30)
    pipeline.abort()
    assert pipeline.wait(30)
    assert not out.finished
    assert out.closed == 1
    with pytest.raises(Cancelled):
        pipeline.report()


def test_a_change_of_size_replans_downstream() -> None:
    small, large = spec(32, 32), spec(64, 64)
    frames = [pattern(small, 0), pattern(small, 1), pattern(large, 2), pattern(large, 3)]
    recorder, out = Recorder(), Collect()
    graph = Graph().add("in", FrameSource(small, frames)).add("hold", recorder, "in")
    graph.add("out", out, "hold")
    report = Pipeline(graph).run()
    assert [f.spec.width for f in out.frames] == [32, 32, 64, 64]
    assert recorder.diary == [
        "plan 32", "open", "flush", "close", "plan 64", "open", "flush", "close",
    ]  # fmt: skip
    assert [s.width for s in out.specs] == [32, 64]
    assert report.problems == []


def test_an_equal_spec_in_another_object_is_no_change() -> None:
    recorder = Recorder()
    frames = [pattern(spec(), 0), pattern(spec(), 1)]
    graph = Graph().add("in", FrameSource(spec(), frames)).add("hold", recorder, "in")
    graph.add("out", Collect(), "hold")
    Pipeline(graph).run()
    assert recorder.diary == ["plan 64", "open", "flush", "close"]


def test_frames_must_come_in_order() -> None:
    frames = [pattern(spec(), 1), pattern(spec(), 1)]
    graph = Graph().add("in", FrameSource(spec(), frames)).add("out", Collect(), "in")
    with pytest.raises(SpecError, match="strictly rising"):
        Pipeline(graph).run()


def test_a_stage_that_drops_frames_is_counted_and_a_stage_may_make_many() -> None:
    class Third(Stage):
        def plan(self, spec: FrameSpec) -> FrameSpec:
            return spec

        def process(self, frame: Frame) -> Iterable[Frame]:
            return [frame] if frame.pts % 3 == 0 else []

    class Twice(Stage):
        def plan(self, spec: FrameSpec) -> FrameSpec:
            self.spec = FrameSpec(
                width=spec.width, height=spec.height, format=spec.format,
                time_base=spec.time_base / 2,
            )  # fmt: skip
            return self.spec

        def process(self, frame: Frame) -> Iterable[Frame]:
            for half in (0, 1):
                yield Frame(frame.planes, self.spec, frame.pts * 2 + half)

    out = Collect()
    graph = Graph().add("in", patterns(9)).add("third", Third(), "in")
    graph.add("twice", Twice(), "third").add("out", out, "twice")
    report = Pipeline(graph).run()
    assert [f.pts for f in out.frames] == [0, 1, 6, 7, 12, 13]
    assert out.frames[-1].spec.time_base == Fraction(1, 50)
    assert report.stage("third").frames_out == 3
    assert report.problems == []


def test_a_live_source_drops_at_the_entrance_and_counts() -> None:
    """The newest frame wins; the links after the first stage never drop."""

    class Live(FrameSource):
        policy = Policy.LATEST

    gate = threading.Event()

    class Slow(Identity):
        def process(self, frame: Frame) -> Iterable[Frame]:
            gate.wait(30)
            return (frame,)

    def frames() -> Iterator[Frame]:
        for pts in range(50):
            yield pattern(spec(), pts)
        gate.set()

    out = Collect()
    graph = Graph().add("in", Live(spec(), frames())).add("slow", Slow(), "in")
    graph.add("out", out, "slow")
    report = Pipeline(graph, capacity=2).run()
    slow = report.stage("slow")
    assert slow.dropped > 40
    assert slow.frames_in + slow.dropped == 50
    assert [f.pts for f in out.frames][-2:] == [48, 49]
    assert report.stage("out").dropped == 0
    assert report.problems == []


def test_frames_are_let_go() -> None:
    """No more frames are alive than the links and the hands of the stages can hold."""
    import weakref

    alive: weakref.WeakSet[Tracked] = weakref.WeakSet()
    most = 0

    class Tracked:
        pass

    class Watch(Sink):
        def plan(self, spec: FrameSpec) -> None: ...

        def write(self, frame: Frame) -> None:
            nonlocal most
            most = max(most, len(alive))

    def frames() -> Iterator[Frame]:
        for pts in range(100):
            frame = pattern(first, pts)
            mark = Tracked()
            alive.add(mark)
            frame.side_data = mark
            del mark
            yield frame
            del frame

    first = spec(8, 8)
    graph = Graph().add("in", FrameSource(first, frames())).add("same", Identity(), "in")
    graph.add("out", Watch(), "same")
    Pipeline(graph, capacity=2).run()
    assert most <= 2 * 2 + 3


class PoisonedRing(Ring):
    """Spoils a slot's contents at the moment it returns, so that a late reader sees it."""

    def _give_back(self, slot: Slot) -> None:
        for buffer in slot.buffers:
            buffer.fill(0xAA)
        super()._give_back(slot)


def test_no_reader_ever_sees_a_slot_that_was_returned() -> None:
    """A ring of the planned depth serves two branches of different speed without growing."""

    class Writer(Identity):
        def open(self) -> None:
            self.ring = PoisonedRing([((8, 8), np.uint8)], self.ring_depth)

        def process(self, frame: Frame) -> Iterable[Frame]:
            slot, planes = self.ring.lease()
            planes[0][:] = frame.pts % 100
            yield frame.replace(planes, frame.spec, slot=slot)

    class Check(Sink):
        def __init__(self, patience: int) -> None:
            self.patience = patience
            self.wrong = 0
            self.seen = 0

        def plan(self, spec: FrameSpec) -> None: ...

        def write(self, frame: Frame) -> None:
            for _ in range(self.patience):
                self.wrong += int((frame.planes[0] != frame.pts % 100).any())
            self.seen += 1

    writer, fast, slow = Writer(), Check(1), Check(50)
    graph = Graph().add("in", patterns(300, spec(8, 8, "gray"))).add("write", writer, "in")
    graph.add("fast", fast, "write").add("slow", slow, "write")
    Pipeline(graph).run()
    assert (fast.seen, slow.seen) == (300, 300)
    assert (fast.wrong, slow.wrong) == (0, 0)
    assert writer.ring.grown == 0


# -- GPU memory ---------------------------------------------------------------------------


class OnGpu(Identity):
    """Says that its frames are on a GPU; never opened."""

    def __init__(self, takes: bool = False) -> None:
        self.takes_memory = takes

    def device_for(self, spec: FrameSpec) -> Device:
        return Device("cuda")


class GpuSink(Collect):
    def device_for(self, spec: FrameSpec) -> Device:
        return spec.device


def planned(limit: int, *stages: OnGpu) -> Pipeline:
    """64x48 yuv420p, 4,608 bytes a frame; planning needs no GPU."""
    graph = Graph("limited").add("in", patterns(1))
    last = "in"
    for number, stage in enumerate(stages):
        graph.add(f"s{number}", stage, last)
        last = f"s{number}"
    graph.add("out", GpuSink(), last)
    pipeline = Pipeline(graph, vram_limit=limit)
    pipeline.plan()
    return pipeline


def test_a_limit_of_gpu_memory_is_shared_among_those_who_take_it() -> None:
    stages = OnGpu(True), OnGpu(), OnGpu(True)
    pipeline = planned(1_000_000, *stages)
    frame = 64 * 48 * 3 // 2
    rings = 4 * 4 * frame  # the transfer's and three stages', four slots each
    assert [s.ring_depth for s in stages] == [4, 4, 4]
    share = (1_000_000 - rings) // 2
    assert [s.memory_bytes for s in stages] == [share, None, share]
    assert pipeline.specs["in-to-cuda"].device == Device("cuda")


def test_little_gpu_memory_makes_rings_shorter_and_says_so() -> None:
    stage = OnGpu(True)
    pipeline = planned(60_000, stage)
    assert stage.ring_depth == 3
    assert stage.memory_bytes == 60_000 - 2 * 3 * 4608
    assert any("are shorter" in note for note in pipeline._notes)


def test_too_little_gpu_memory_is_refused_before_anything_starts() -> None:
    with pytest.raises(SpecError, match=r"the frames alone need .* Raise --vram-limit"):
        planned(20_000, OnGpu(True))


def test_behind_a_live_source_a_transfer_keeps_the_latest_frame_too() -> None:
    source = patterns(1)
    source.policy = Policy.LATEST
    graph = Graph("live").add("in", source).add("s", OnGpu(), "in")
    pipeline = Pipeline(graph.add("out", GpuSink(), "s"))
    pipeline.plan()
    links = [r.input.policy for r in pipeline._runners.values() if r.input is not None]
    assert links == [Policy.LATEST, Policy.LATEST, Policy.BLOCK]
