"""Several frames at once on a CPU, in order, none held back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelgen
import numpy as np
import pytest

from vidpipe.errors import ModelError
from vidpipe.frame import Frame
from vidpipe.graph import Graph
from vidpipe.link import Link, Policy
from vidpipe.model import tiling
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import describe
from vidpipe.model.lanes import Lanes
from vidpipe.model.session import HostSession
from vidpipe.model.stage import Model
from vidpipe.pipeline import Pipeline
from vidpipe.stage import FrameSource
from vidpipe.testing import Collect, ManualClock, pattern, spec

SPEC = spec(32, 32)
COUNT = 20


class Copies(Collect):
    """Keeps no slot of a ring."""

    def write(self, frame: Frame) -> None:
        super().write(frame.replace([p.copy() for p in frame.planes], frame.spec))


def run(source: FrameSource, **options: Any) -> tuple[list[Frame], dict[str, Any]]:
    graph, sink = Graph().add("in", source), Copies()
    graph.add("model", "model", "in", **options).add("out", sink, "model")
    report = Pipeline(graph).run()
    assert not report.problems
    return sink.frames, report.stage("model").facts


def given(count: int = COUNT) -> FrameSource:
    return FrameSource(SPEC, (pattern(SPEC, pts) for pts in range(count)))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(modelgen.random_net(tmp_path / "net.onnx", 2, 1, depth=2))


def test_two_frames_at_once_give_what_one_gives(path: str) -> None:
    two, facts = run(given(), model=path, threads=2)
    assert (facts["threads"], facts["at_once"], facts["ring_grown"]) == (2, 2, 0)
    one, facts = run(given(), model=path, threads=2, prefer="latency")
    assert facts["at_once"] == 1
    assert [f.pts for f in two] == [f.pts for f in one] == list(range(COUNT))
    for a, b in zip(two, one, strict=True):
        assert all(map(np.array_equal, a.planes, b.planes))


def test_rows_that_are_apart_are_copied_for_each_frame_by_itself(path: str) -> None:
    def apart() -> Iterator[Frame]:
        for pts in range(COUNT):
            frame = pattern(SPEC, pts)
            wide = [np.zeros((p.shape[0], p.shape[1] + 16), p.dtype) for p in frame.planes]
            for w, p in zip(wide, frame.planes, strict=True):
                w[:, : p.shape[1]] = p
            planes = [w[:, : p.shape[1]] for w, p in zip(wide, frame.planes, strict=True)]
            yield frame.replace(planes, SPEC)

    two, facts = run(FrameSource(SPEC, apart()), model=path, threads=2)
    assert facts["at_once"] == 2
    one, _ = run(given(), model=path, threads=1)
    for a, b in zip(two, one, strict=True):
        assert all(map(np.array_equal, a.planes, b.planes))


@pytest.mark.parametrize(
    "options", [{"threads": 3}, {"prefer": "efficiency"}, {"threads": 2, "tile": "32x32"}]
)
def test_where_it_does_not_suit_it_is_one_frame_at_a_time(
    path: str, options: dict[str, Any]
) -> None:
    frames, facts = run(given(3), model=path, **options)
    assert len(frames) == 3
    assert facts["at_once"] == 1


def test_where_memory_is_short_it_is_one_frame_at_a_time_and_then_tiles(path: str) -> None:
    whole = compile_model(describe(Path(path)), SPEC)
    weights, peak = tiling.weight_bytes(whole.proto), tiling.peak_bytes(whole.proto)
    for limit, at_once, tiled in (
        (2 * peak - weights, 2, False),
        (2 * peak - weights - 1, 1, False),
        (peak, 1, False),
    ):
        frames, facts = run(given(5), model=path, threads=2, memory_limit=str(limit))
        assert len(frames) == 5
        assert (facts["at_once"], facts["tiles"] is not None) == (at_once, tiled)
    large = spec(96, 96)
    peak = tiling.peak_bytes(compile_model(describe(Path(path)), large).proto)
    source = FrameSource(large, (pattern(large, pts) for pts in range(5)))
    frames, facts = run(source, model=path, threads=2, memory_limit=str(peak - 1))
    assert len(frames) == 5
    assert facts["at_once"] == 1
    assert facts["tiles"]


def test_frames_of_a_live_source_are_run_one_by_one(path: str) -> None:
    source = given(3)
    source.policy = Policy.LATEST
    graph = Graph().add("in", source).add("model", "model", "in", model=path, threads=2)
    report = Pipeline(graph.add("out", Collect(), "model")).run()
    assert report.stage("model").facts["at_once"] == 1


def test_a_frame_comes_out_without_another_one_going_in(path: str) -> None:
    back = threading.Semaphore(0)

    class Says(Collect):
        def write(self, frame: Frame) -> None:
            super().write(frame)
            back.release()

    def asks() -> Iterator[Frame]:
        for pts in range(5):
            yield pattern(SPEC, pts)
            assert back.acquire(timeout=60)

    graph, sink = Graph().add("in", FrameSource(SPEC, asks())), Says()
    graph.add("model", Model(model=path, threads=2), "in").add("out", sink, "model")
    report = Pipeline(graph).run()
    assert report.stage("model").facts["at_once"] == 2
    assert [f.pts for f in sink.frames] == list(range(5))


def test_two_models_in_a_row_need_no_more_slots_than_were_made(path: str) -> None:
    graph, sink = Graph().add("in", given()), Copies()
    graph.add("one", "model", "in", model=path, threads=2)
    graph.add("two", "model", "one", model=path, threads=2).add("out", sink, "two")
    report = Pipeline(graph).run()
    assert [f.pts for f in sink.frames] == list(range(COUNT))
    assert [report.stage(name).facts["ring_grown"] for name in ("one", "two")] == [0, 0]


def test_a_change_of_size_finishes_what_is_under_way(path: str) -> None:
    other = spec(48, 32)
    given = [pattern(SPEC if pts < 7 else other, pts) for pts in range(14)]
    graph = Graph().add("in", FrameSource(SPEC, given))
    model = Model(model=path, threads=2)
    sink = Copies()
    graph.add("model", model, "in").add("out", sink, "model")
    report = Pipeline(graph).run()
    assert not report.problems
    assert [(f.pts, f.spec.width) for f in sink.frames] == [
        (f.pts, 2 * f.spec.width) for f in given
    ]
    assert report.stage("model").facts["at_once"] == 2
    assert report.stage("model").busy_s > 0


def test_an_error_is_blamed_on_its_frame(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = HostSession.run

    def fails(self: HostSession, slot: int, inputs: Any, stream: Any = None) -> None:
        if inputs[0][0, 0] == pattern(SPEC, 4).planes[0][0, 0]:
            raise ModelError("no")
        ran(self, slot, inputs, stream)

    monkeypatch.setattr(HostSession, "run", fails)
    with pytest.raises(ModelError, match=r"stage 'model'.*: no") as caught:
        run(given(8), model=path, threads=2)
    assert caught.value.time_s == pytest.approx(float(4 * SPEC.time_base))
    assert not [t.name for t in threading.enumerate() if "lane" in t.name]


def test_a_woken_link_gives_none_between_frames() -> None:
    link = Link(2)
    link.wake()
    items = link.items()
    assert next(items) is None
    link.put(pattern(SPEC, 1))
    link.wake()
    frame = next(items)
    assert frame is not None
    link.end()
    assert list(items) == []
    assert list(link) == []


def test_time_in_lanes_is_shared_out_and_waits_are_not_counted_twice() -> None:
    clock, woken = ManualClock(), threading.Semaphore(0)
    lanes: Lanes[str] = Lanes(2, clock, woken.release, "test")
    lanes.put(lambda: clock.advance(3.0), "first", 0)
    assert woken.acquire(timeout=60)
    assert list(lanes.done(1)) == [("first", None, 1.5)]
    error = ValueError("no")

    def fail() -> None:
        raise error

    lanes.put(fail, "second", 1)
    assert list(lanes.done(0)) == [("second", error, 0.0)]
    lanes.close()
