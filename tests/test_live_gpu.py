"""The live filter on a GPU: against doubles everywhere, and on a real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakecupy
import modelgen
import numpy as np
import pytest
from livekit import Feed, live_spec, one, same, until

from vidpipe.device import CPU, Device, import_cupy
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.live import command
from vidpipe.live.capture import Frames
from vidpipe.live.enhance import Enhance, Enhanced
from vidpipe.live.outputs import Callback, LiveSink
from vidpipe.live.page import on_host
from vidpipe.live.session import Live
from vidpipe.model.choose import Choice
from vidpipe.runner import StageReport
from vidpipe.testing import pattern, spec
from vidpipe.transfer import Mover

GPU = Device("cuda")


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "real":
        yield
        return
    with fakecupy.installed():
        yield


@pytest.fixture(scope="module")
def cleaner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that changes the picture and keeps its size."""
    return str(modelgen.random_net(tmp_path_factory.mktemp("m") / "one.onnx", 1, 3, depth=2))


@pytest.fixture(scope="module")
def doubler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(modelgen.nearest(tmp_path_factory.mktemp("m") / "two.onnx", 2, 3))


class Host(LiveSink):
    """Keeps what comes, on the host."""

    capacity = 50

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []

    def deliver(self, frame: Frame) -> str | None:
        self.frames.append(frame)
        return None


def opened(stage: Enhance, first: FrameSpec) -> Enhance:
    assert stage.device_for(spec()) == first.device
    stage.plan(first)
    stage.ring_depth = 4
    stage.open()
    return stage


def worst(a: tuple[Any, ...], b: tuple[Any, ...]) -> int:
    return max(int(abs(p.astype(int) - q).max()) for p, q in zip(a, b, strict=True))


@pytest.mark.usefixtures("gpu")
def test_every_control_does_on_a_gpu_what_it_does_on_the_cpu(cleaner: str) -> None:
    up = Mover(spec(), GPU, 12)
    here = opened(Enhance(tiers=[cleaner], latency_budget_s=5), spec())
    there = opened(Enhance(tiers=[cleaner], latency_budget_s=5, device="cuda"), up.spec)
    kept = []
    changes: list[dict[str, Any]] = [
        {"strength": 1.0}, {"strength": 0.5}, {"strength": 1.0, "wipe": 0.5}, {"strength": 0.25},
        {"wipe": None, "enabled": False}, {"enabled": True}, {"frozen": True}, {"wipe": 0.25},
        {"frozen": False, "wipe": None, "strength": 1.0},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        for stage in (here, there):
            stage.controls.change(change)
        frame = pattern(spec(), number)
        wanted, got = one(here, frame), one(there, up.move(frame))
        assert (got.spec.device, got.ready) == (GPU, None)
        assert got.slot is not None
        assert worst(on_host(got), wanted.planes) <= 1, change
        assert got.before is not None
        assert wanted.before is not None
        assert same(on_host(got.before), wanted.before.planes)
        kept.append((got, [p.copy() for p in on_host(got)]))
    for got, planes in kept:
        assert same(on_host(got), tuple(planes))
    assert there.provider() == "cuda:0 (CUDAExecutionProvider)"
    for stage in (here, there):
        stage.close()


@pytest.mark.usefixtures("gpu")
def test_the_plain_tier_repeats_pixels_on_a_gpu(doubler: str) -> None:
    up = Mover(spec(), GPU, 4)
    stage = opened(Enhance(tiers=[doubler], device="cuda", tier="scale"), up.spec)
    frame = pattern(spec(), 3)
    planes = on_host(one(stage, up.move(frame)))
    assert same(planes, tuple(p.repeat(2, 0).repeat(2, 1) for p in frame.planes))
    stage.close()


@pytest.mark.usefixtures("gpu")
def test_frames_of_the_host_go_up_and_come_down_still_enhanced(
    doubler: str, tmp_path: Path
) -> None:
    feed, host, seen = Feed(live_spec()), Host(), list[Frame]()
    graph = Graph().add("in", Frames(feed.spec, feed))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0, device="cuda")
    graph.add("out", Callback(seen.append), "enhance").add("host", host, "enhance")
    graph.add("page", "page", "enhance")
    live = Live(graph, snapshots=tmp_path)
    pictures: list[Any] = []
    live.pages["enhance"].watch(pictures.append)
    live.start()
    for number in range(1, 4):
        feed.push()
        until(lambda n=number: len(host.frames) == n and len(seen) == n and len(pictures) == n)  # type: ignore[misc]
    paths = live.snapshot()
    feed.end()
    report = live.stop()
    assert report is not None
    assert not report.problems
    assert [s.name for s in report.stages if s.use == "transfer"] == [
        "in-to-cuda",
        "enhance-to-cpu",
    ]
    assert all(f.spec.device == GPU and f.ready is None for f in seen)
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in paths.values())
    assert all(p.before.startswith(b"\xff\xd8") and p.before != p.after for p in pictures)
    for number, frame in enumerate(host.frames):
        assert isinstance(frame, Enhanced)
        assert frame.enhanced_s > 0
        assert all(type(p) is np.ndarray for p in frame.planes)
        source = pattern(feed.spec, number * 3600)
        assert same(on_host(frame.before or frame), source.planes)
        assert worst((frame.planes[0],), (source.planes[0].repeat(2, 0).repeat(2, 1),)) <= 30
        assert same(frame.planes, on_host(seen[number]))


@pytest.mark.usefixtures("gpu")
def test_arrays_on_the_gpu_stay_there_from_a_generator_to_a_callback(doubler: str) -> None:
    up, seen = Mover(live_spec(), GPU, 8), list[Frame]()
    feed = Feed(live_spec())
    graph = Graph().add("in", Frames(up.spec, (up.move(f) for f in feed)))
    graph.add("enhance", "enhance", "in", tiers=[doubler], latency_budget_s=5.0)
    live = Live(graph.add("out", Callback(seen.append), "enhance"))
    live.start()
    for number in range(1, 6):
        feed.push()
        until(lambda n=number: len(seen) == n)  # type: ignore[misc]
    feed.end()
    report = live.stop()
    assert report is not None
    assert [s.name for s in report.stages] == ["in", "enhance", "out"]
    kind = import_cupy(GPU).ndarray
    assert all(isinstance(p, kind) for f in seen for p in f.planes)
    assert {s.facts.get("provider") for s in report.stages[1:2]} == {
        "cuda:0 (CUDAExecutionProvider)"
    }


def test_drops_at_the_entrance_are_counted_at_the_transfer_too() -> None:
    graph = Graph().add("in", "capture", address="lavfi:testsrc2")
    graph.add("enhance", "enhance", "in", tiers=[]).add("out", Callback(print), "enhance")
    live = Live(graph)
    drops = {"in": 0, "in-to-cuda": 3, "enhance": 4, "enhance-to-cpu": 5, "out": 6}
    progress = {name: StageReport(name, "x", dropped=n) for name, n in drops.items()}
    assert live._source(live.sources["in"], progress)["drops"] == {"entrance": 7}


def test_the_device_is_chosen_once_and_explicit_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def choose(*what: Any, **options: Any) -> Choice:
        asked.append((what, options))
        return Choice("cuda:1", "gpu", "auto: cuda:1, for a reason")

    monkeypatch.setattr("vidpipe.model.choose.choose", choose)
    graph = command.live_graph("camera", page=True)
    graph.add("second", "enhance", "source", tiers=["nano-2x"], device="cpu")
    graph.add("third", "enhance", "source", tiers=["scale"])
    command.place(graph, "1280x720", 3)
    assert asked == [((None, "clean-2x-quality", (1280, 720)), {"precision": "auto", "threads": 3})]
    options = {name: graph.nodes[name].options for name in ("enhance", "second", "third")}
    assert options["enhance"]["device"] == "cuda:1"
    assert options["enhance"]["chosen"] == "auto: cuda:1, for a reason"
    assert options["second"]["device"] == "cpu"
    assert "device" not in options["third"]
    named = command.live_graph("camera", device="openvino:npu", page=True)
    command.place(named)
    assert named.nodes["enhance"].options["device"] == "openvino:npu"
    assert len(asked) == 1


def test_a_filter_says_where_it_takes_frames(doubler: str) -> None:
    there = replace(spec(), device=Device("cuda", 1))
    assert Enhance(tiers=[doubler]).device_for(there) == there.device
    assert Enhance(tiers=[]).device_for(there) == there.device
    assert Enhance(tiers=[doubler], device="cpu").device_for(there) == CPU
    assert Enhance(tiers=[doubler], device="rtx:1").device_for(spec()) == there.device
    assert Callback(print).device_for(there) == there.device
    assert Host().device_for(there) == CPU
