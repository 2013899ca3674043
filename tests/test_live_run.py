"""Live graphs that run: the latest frame wins, nobody is held up, sizes change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from livekit import (
    Feed,
    live_spec,
    until,
)

from vidpipe.device import Device
from vidpipe.errors import InputError, SpecError
from vidpipe.frame import Frame
from vidpipe.graph import Graph
from vidpipe.live.capture import Frames
from vidpipe.live.outputs import Callback, Record
from vidpipe.live.session import Live
from vidpipe.testing import ManualClock, pattern

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_the_latest_frame_wins_and_every_drop_is_counted(doubler: str) -> None:
    feed, gate, seen = Feed(live_spec()), threading.Event(), []

    def slow(frame: Frame) -> None:
        seen.append(frame.pts)
        gate.wait(20)

    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", Callback(slow), "enhance")
    live = Live(graph)
    live.start()
    feed.push(40)
    until(lambda: live.pipeline.progress()[0].frames_out == 40)
    gate.set()
    feed.end()
    assert live.wait(20)
    report = live.pipeline.report()
    assert report.problems == []
    assert seen[-1] == 39 * 3600
    dropped = sum(s.dropped for s in report.stages)
    assert len(seen) + dropped == 40
    assert dropped > 20


def test_a_stalled_sink_does_not_hold_up_the_others(doubler: str) -> None:
    feed, gate, seen = Feed(live_spec()), threading.Event(), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("stuck", Callback(lambda _f: gate.wait(30)), "enhance")
    graph.add("free", Callback(lambda f: seen.append(f.pts)), "enhance")
    live = Live(graph)
    live.start()
    for number in range(30):
        feed.push()
        until(lambda n=number: len(seen) > n)
    state = live.state()["sinks"]
    assert state["free"]["frames"] == 30
    assert state["stuck"]["frames"] == 0
    assert state["stuck"]["drops"]["behind"] == 28  # one in its hands, one on the link
    gate.set()
    feed.end()
    assert live.wait(20)


def test_a_new_size_is_planned_without_a_restart(doubler: str, tmp_path: Path) -> None:
    feed, sizes = Feed(live_spec()), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", Callback(lambda f: sizes.append((f.spec.width, f.spec.height))), "enhance")
    graph.add("record", "record", "enhance", path=str(tmp_path / "r.mkv"))
    live = Live(graph)
    live.start()
    for count, size in enumerate([(64, 48), (96, 64), (64, 48)], 1):
        feed.push(1, live_spec(*size))
        until(lambda c=count: len(sizes) == c)
        until(lambda c=count: live.sinks["record"].measure(live.clock).read().frames == c)
    feed.end()
    assert live.wait(20)
    assert live.pipeline.report().problems == []
    assert sizes == [(128, 96), (192, 128), (128, 96)]
    with av.open(str(tmp_path / "r.mkv")) as file:
        assert [(f.width, f.height) for f in file.decode(video=0)] == 3 * [(128, 96)]


def test_latency_is_measured_from_capture_to_each_sink() -> None:
    clock = ManualClock(100.0)
    sink = Callback(lambda _frame: clock.advance(0.04))
    sink.clock = clock
    for number in range(10):
        frame = pattern(live_spec(), number)
        frame.captured_s = clock.now_s() - 0.01
        sink.write(frame)
    reading = sink.measure(clock).read()
    assert reading.p50_s == reading.p99_s == pytest.approx(0.05)
    assert sink.report()["frames"] == 10


def test_snapshots_are_the_picture_before_and_after(doubler: str, tmp_path: Path) -> None:
    feed, seen = Feed(live_spec()), []
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    graph.add("out", Callback(seen.append), "enhance")
    live = Live(graph, snapshots=tmp_path)
    live.start()
    with pytest.raises(InputError, match="no picture yet"):
        live.snapshot()
    live.control({"wipe": 0.5})
    feed.push(value=100)
    until(lambda: seen)
    first = live.snapshot()
    second = live.snapshot("enhance")
    assert len({*first.values(), *second.values()}) == 4
    with av.open(first["before"]) as file:
        before = next(file.decode(video=0))
    with av.open(first["after"]) as file:
        after = next(file.decode(video=0))
    assert (before.width, before.height, after.width, after.height) == (64, 48, 128, 96)
    small, large = (f.to_ndarray(format="rgb24").astype(int) for f in (before, after))
    assert np.ptp(small, axis=(0, 1)).max() <= 1
    assert np.ptp(large, axis=(0, 1)).max() <= 1  # no line: the snapshot has no wipe in it
    assert np.abs(large[0, 0] - small[0, 0]).max() <= 1
    # BT.601, limited range, Y = Cb = Cr = 100
    assert np.abs(small[0, 0] - [53, 132, 41]).max() <= 3
    assert live.snapshot_bytes("after") == Path(second["after"]).read_bytes()
    with pytest.raises(InputError, match="Did you mean 'enhance'"):
        live.control({"enabled": True}, "enhanse")
    feed.end()
    assert live.wait(20)
    kinds = [e["event"] for e in live.events()]
    assert kinds == ["control", "snapshot", "snapshot"]


def test_two_filters_in_one_graph_are_controlled_one_by_one(doubler: str) -> None:
    feeds = [Feed(live_spec()), Feed(live_spec(32, 32))]
    seen: list[list[Frame]] = [[], []]
    graph = Graph()
    for number, feed in enumerate(feeds):
        graph.add(f"in{number}", Frames(feed.spec, feed))
        graph.add(f"f{number}", "enhance", f"in{number}", tiers=[doubler], latency_budget_s=5.0)
        graph.add(f"out{number}", Callback(seen[number].append), f"f{number}")
    live = Live(graph)
    live.start()
    live.control({"enabled": False}, "f1")
    for feed in feeds:
        feed.push()
    until(lambda: seen[0] and seen[1])
    state = live.state()
    assert state["filters"]["f0"]["enabled"]
    assert not state["filters"]["f1"]["enabled"]
    assert state["filters"]["f1"]["source"] == "in1"
    assert state["sinks"]["out1"]["filter"] == "f1"
    assert state["filters"]["f0"]["provider"] == "cpu (CPUExecutionProvider)"
    for feed in feeds:
        feed.end()
    assert live.wait(20)


def test_an_iterator_feeds_a_filter_and_a_callback_gets_its_arrays(doubler: str) -> None:
    """As docs/live.md shows it."""
    first = live_spec()
    kept: list[Frame] = []
    pictures = (pattern(first, n * 3600) for n in range(3))
    gate = threading.Semaphore(1)

    def paced() -> Iterator[Frame]:
        for picture in pictures:
            gate.acquire(timeout=20)
            yield picture

    def take(frame: Frame) -> None:
        kept.append(frame)
        gate.release()

    graph = Graph().add("in", Frames(first, paced()))
    graph.add("enhance", "enhance", "in", tiers=[doubler], tier=doubler)
    graph.add("out", Callback(take), "enhance")
    live = Live(graph)
    live.start()
    assert live.wait(20)
    assert [f.pts for f in kept] == [0, 3600, 7200]
    assert all(f.captured_s > 0 for f in kept)
    for n, frame in enumerate(kept):
        # The very arrays of the stage, on its device; they may be kept.
        wanted = pattern(first, n * 3600).planes[0].repeat(2, 0).repeat(2, 1)
        assert np.array_equal(frame.planes[0], wanted)


def test_a_callback_gets_device_frames_as_they_are() -> None:
    seen: list[Frame] = []
    sink = Callback(seen.append)
    on_gpu = replace(live_spec(), device=Device("cuda", 0))
    sink.plan(on_gpu)  # other live sinks refuse frames that are not on the host
    with pytest.raises(SpecError, match="on the CPU"):
        Record(path="x.mkv").plan(on_gpu)
    frame = pattern(live_spec(), 1)
    frame.captured_s = 1.0
    sink.write(frame)
    assert seen == [frame]
    assert all(a is b for a, b in zip(seen[0].planes, frame.planes, strict=True))
