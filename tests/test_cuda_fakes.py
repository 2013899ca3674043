"""The GPU path against doubles, on any machine; `test_cuda.py` runs it on a real GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakecupy
import modelgen
import numpy as np
import pytest

from vidpipe import pipeline, trace
from vidpipe.device import CPU, Device, Ring, host_waits, new_stream
from vidpipe.errors import DeviceError, DeviceMemoryError, VidpipeError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.model.cache import Cache
from vidpipe.model.compile import compile_model
from vidpipe.model.cuda import CudaSession
from vidpipe.model.descriptor import describe
from vidpipe.model.stage import Model
from vidpipe.pipeline import Pipeline
from vidpipe.providers import provider
from vidpipe.providers.base import Found
from vidpipe.stage import FrameSource, Null, Sink, Stage
from vidpipe.testing import Collect, pattern, spec
from vidpipe.transfer import Mover, Transfer

GPU = Device("cuda")
SPEC = spec(name="nv12")


@pytest.fixture(autouse=True)
def script() -> Iterator[fakecupy.Script]:
    with fakecupy.installed() as found:
        yield found


def run(count: int, *stages: Any) -> tuple[list[Frame], Any]:
    graph, sink, last = Graph("test"), Collect(), "in"
    graph.add("in", FrameSource(SPEC, (pattern(SPEC, pts) for pts in range(count))))
    for number, stage in enumerate(stages):
        graph.add(f"s{number}", stage, last)
        last = f"s{number}"
    report = Pipeline(graph.add("out", sink, last)).run()
    assert not report.problems
    assert all(type(p) is np.ndarray for f in sink.frames for p in f.planes)
    return sink.frames, report


def differ(a: list[Frame], b: list[Frame]) -> int:
    frames = zip(a, b, strict=True)
    planes = [pair for f, g in frames for pair in zip(f.planes, g.planes, strict=True)]
    return max(int(abs(p.astype(int) - q).max()) for p, q in planes)


def session(tmp_path: Path, found: Any = None, **options: Any) -> tuple[CudaSession, Any]:
    """A session on frames with two slots, prepared, and what they hold."""
    model = describe(modelgen.nearest(tmp_path / "m.onnx", 2, 3))
    compiled = compile_model(model, replace(SPEC, device=GPU), portable=False, half=False)
    made = CudaSession(compiled, device=GPU, stream=new_stream(GPU), found=found, **options)
    ring = Ring([(t.plane_shape, t.dtype) for t in compiled.outputs], 2, GPU)
    for slot in ring.slots:
        made.bind(slot.index, slot.buffers)
    made.prepare()
    return made, ring


def test_rings_on_the_gpu_lend_slots_until_the_last_view_is_gone(script: Any) -> None:
    ring = Ring([((4, 6), np.uint8), ((2, 3, 2), np.uint8)], 1, GPU)
    slot, planes = ring.lease()
    assert planes[1].data.ptr == planes[0].data.ptr + planes[0].nbytes
    row = planes[0][1]
    del planes
    other, planes = ring.lease()
    assert (other.index, ring.grown) == (1, 1)
    del row
    assert ring.lease()[0] is slot
    del planes
    # Work that reads it may be queued still: the one that has been free for longer comes first.
    assert ring.lease()[0] is slot
    assert ring.lease()[0] is other
    script.free = 10
    with pytest.raises(DeviceMemoryError, match="no 0 MiB left for frames"):
        Ring([((4, 6), np.uint8)], 1, GPU)


def test_frames_move_up_and_down_without_a_wait() -> None:
    up = Mover(SPEC, GPU, 2)
    down = Mover(up.spec, Device(), 2)
    waiting = [up.move(pattern(SPEC, pts)) for pts in range(5)]
    for pts, there in enumerate(waiting):
        back = down.move(there)
        assert back.ready is not None
        back.ready.synchronize()
        assert all(map(np.array_equal, pattern(SPEC, pts).planes, back.planes))
    for pts in range(5):
        frame = pattern(SPEC, pts)
        there = up.move(frame)
        back = down.move(there)
        assert there.ready is not None
        assert back.ready is not None
        assert not all(map(np.array_equal, frame.planes, back.planes))
        back.ready.synchronize()
        assert all(map(np.array_equal, frame.planes, back.planes))


def test_a_pipeline_moves_frames_where_the_model_is_and_waits_for_them(tmp_path: Path) -> None:
    path = str(modelgen.random_net(tmp_path / "net.onnx", 2, 3, depth=2))
    there, report = run(9, Model(model=path, device="cuda", memory_limit="1G"))
    here, _ = run(9, Model(model=path))
    assert differ(there, here) <= 1
    names = [s.name for s in report.stages]
    assert names == ["in", "in-to-cuda", "s0", "s0-to-cpu", "out"]
    facts = report.stage("s0").facts
    assert facts["device"] == "cuda:0"
    assert facts["nodes"] == {"CUDAExecutionProvider": 2}
    assert facts["cuda_graph"]["used"]
    graph = Graph().add("in", FrameSource(SPEC, iter([pattern(SPEC)])))
    graph.add("m", Model(model=path, device="cuda"), "in").add("out", Null(), "m")
    assert not Pipeline(graph).run().problems


def on_rtx() -> Found:
    """TensorRT for RTX as ONNX Runtime would offer it on a card."""
    card = SimpleNamespace(
        type="OrtHardwareDeviceType.GPU",
        metadata={},
        vendor="NVIDIA",
        vendor_id=0x10DE,
        device_id=1,
    )
    rtx = provider("rtx")
    return Found(rtx, rtx.ep, SimpleNamespace(device=card, ep_metadata={"version": "1.0"}))


def test_a_luma_model_runs_between_the_kernels(tmp_path: Path, script: Any) -> None:
    path = str(modelgen.nearest(tmp_path / "m.onnx", 2))
    _, report = run(3, Model(model=path, device="cuda"))
    assert script.kernels == ["luma_in", "planes_out"] * 3
    assert report.stage("s0").facts["cuda_graph"]["used"]


def test_the_providers_get_their_own_options(tmp_path: Path, script: Any) -> None:
    made, _ = session(tmp_path, memory_bytes=1 << 20)
    options, entries, runs, attached = script.sessions[-1]
    assert attached is None
    assert (options["enable_cuda_graph"], options["gpu_mem_limit"]) == ("1", str(1 << 20))
    assert entries["session.disable_cpu_ep_fallback"] == "1"
    assert {e["gpu_graph_id"] for e in runs} == {"-1", "1", "2"}
    assert made.graph.used
    assert (made.graph.eager_ms, made.graph.replay_ms) == (2.0, 1.0)
    found = on_rtx()
    rtx, plug = found.provider, found.device
    script.providers = [rtx.ep]
    made, _ = session(tmp_path, found, memory_bytes=1 << 20)
    options, _, runs, attached = script.sessions[-1]
    assert attached[0] == [plug]
    assert (options["enable_cuda_graph"], options["has_user_compute_stream"]) == ("1", "1")
    assert "gpu_mem_limit" not in options
    assert Path(options["nv_runtime_cache_path"]).is_dir()
    assert {e["cuda_graph_annotation_id"] for e in runs} == {"-1", "1", "2"}
    assert made.nodes_by_provider() == {rtx.ep: 2}
    made.close()


def test_what_rtx_compiles_is_kept(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDPIPE_CACHE", str(tmp_path / "cache"))
    found = on_rtx()
    script.providers = [found.ep]
    for _ in range(2):
        made, _ = session(tmp_path, found)
        assert made.note == ""
        made.close()
    assert [options["user_compute_stream"] != "" for options in script.compiled] == [True]
    (kept,) = (entry for entry in Cache().entries() if entry.kind == "context")
    file = next(kept.folder.glob("*.onnx"))
    file.write_bytes(b"no model")
    made, _ = session(tmp_path, found)
    assert made.note
    assert len(script.compiled) == 2
    made.close()


def test_a_graph_that_is_slower_by_chance_alone_is_used(tmp_path: Path, script: Any) -> None:
    script.replay_ms = 2.02  # 2.0 without it
    made, _ = session(tmp_path)
    assert made.graph.used
    made.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"replay": "differs"}, "the replay differs from the run without a graph"),
        ({"replay_ms": 2.06}, "the replay is slower"),
        ({"capture": "fails"}, "capture failed: ONNX Runtime cannot run the model on cuda:0"),
    ],
)
def test_graphs_that_are_not_worth_it_are_not_used(
    tmp_path: Path, script: Any, change: dict[str, Any], reason: str
) -> None:
    vars(script).update(change)
    made, ring = session(tmp_path)
    assert not made.graph.used
    assert made.graph.reason.startswith(reason)
    runs = script.sessions[-1][2]
    before = len(runs)
    inputs = [buffer.copy() for buffer in made.inputs]
    inputs[0][...] = np.arange(64).astype(np.uint8).view(type(inputs[0])) + 50
    inputs[1][...] = 128
    event = made.run(1, inputs, made._stream)
    assert event is not None
    event.synchronize()
    assert [e["gpu_graph_id"] for e in runs[before:]] == ["-1"]
    luma = ring.slots[1].buffers[0].get()
    assert abs(luma.astype(int)[::2, ::2] - inputs[0].get()).max() <= 1


def test_what_the_gpu_cannot_do_is_said(tmp_path: Path, script: Any) -> None:
    script.fits = 10
    with pytest.raises(DeviceMemoryError, match="too little free memory for the model"):
        session(tmp_path)
    script.fits, script.providers = 1 << 40, ["CPUExecutionProvider"]
    with pytest.raises(DeviceError, match="asked for CUDAExecutionProvider, got CPUExecution"):
        session(tmp_path)


def test_tiles_are_halved_until_they_fit(tmp_path: Path, script: Any) -> None:
    path = str(modelgen.nearest(tmp_path / "m.onnx", 2, 3))
    whole, _ = run(3, Model(model=path, device="cuda"))
    script.fits = 64 * 40
    tiled, report = run(3, Model(model=path, device="cuda"))
    assert report.stage("s0").facts["tiles"] is not None
    assert differ(tiled, whole) == 0
    with pytest.raises(DeviceMemoryError):
        run(1, Model(model=path, device="cuda", tile="off"))


class Tap(Stage):
    """Passes frames on where they are, one late."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.held: Frame | None = None
        self.specs: list[FrameSpec] = []
        self.closed = 0

    def device_for(self, spec: FrameSpec) -> Device:
        return spec.device

    def plan(self, spec: FrameSpec) -> FrameSpec:
        self.specs.append(spec)
        return spec

    def process(self, frame: Frame) -> Iterable[Frame]:
        if frame.pts == self.fail_at:
            raise ZeroDivisionError("no")
        given, self.held = self.held, frame
        return () if given is None else (given,)

    def flush(self) -> Iterable[Frame]:
        given, self.held = self.held, None
        return () if given is None else (given,)

    def close(self) -> None:
        self.closed += 1


def test_a_new_size_is_planned_again_on_the_gpu() -> None:
    small = replace(SPEC, width=8, height=8)
    tap, sink, graph = Tap(), Collect(), Graph("test")
    given = [pattern(SPEC if pts < 3 else small, pts) for pts in range(6)]
    graph.add("in", FrameSource(SPEC, given)).add("up", "transfer", "in", device="cuda")
    graph.add("s0", tap, "up").add("out", sink, "s0")
    assert not Pipeline(graph).run().problems
    assert [(f.pts, f.spec.width) for f in sink.frames] == [(f.pts, f.spec.width) for f in given]
    assert [s.width for s in tap.specs] == [SPEC.width, 8]


def test_a_failure_names_the_stage_and_closes_everybody_once() -> None:
    taps = Tap(), Tap(fail_at=4), Tap()
    with pytest.raises(VidpipeError, match=r"ZeroDivisionError: no") as caught:
        run(9, Model(model="nano-2x", device="cuda"), *taps)
    assert caught.value.stage == "s2"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.time_s == pytest.approx(float(4 * SPEC.time_base))
    assert [t.closed for t in taps] == [1, 1, 1]


def test_a_profile_tells_apart_who_shares_a_gpu() -> None:
    tracer, graph = trace.Tracer(), Graph("test")
    graph.add("in", FrameSource(SPEC, (pattern(SPEC, pts) for pts in range(5))))
    graph.add("up", "transfer", "in", device="cuda").add("tap", Tap(), "up")
    assert not Pipeline(graph.add("out", Collect(), "tap"), tracer=tracer).run().problems
    events = tracer.to_dict()["traceEvents"]
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    for name in ("up", "tap"):
        own = [e for e in events if e["ph"] == "X" and e["tid"] == tracks[name]]
        assert [e["args"]["pts"] for e in own if e["name"] == "frame"] == list(range(5))
        assert sum(e["name"] == "open" for e in own) == 1


def late(count: int) -> Iterator[Frame]:
    """Frames whose pictures are drawn by their stream: 100, 101 and so on."""
    made, stream = replace(SPEC, device=GPU), new_stream(GPU)
    for pts in range(count):
        _, planes = Ring([(shape, np.uint8) for shape in made.plane_shapes()], 1, GPU).lease()
        stream.add(functools.partial(planes[0].fill, 100 + pts))
        yield Frame(planes, made, pts, ready=stream.record())


class Reader(Sink):
    """Reads frames on the CPU as it gets them."""

    def __init__(self) -> None:
        self.planes: list[Any] = []

    def plan(self, spec: FrameSpec) -> None:
        assert spec.device == CPU

    def write(self, frame: Frame) -> None:
        self.planes.append(frame.planes[0].copy())


@pytest.mark.parametrize("bundles", [True, False])
def test_a_sink_on_the_cpu_gets_frames_that_are_finished(script: Any, bundles: bool) -> None:
    graph, sink = Graph("test"), Reader()
    source = FrameSource(replace(SPEC, device=GPU), late(11))
    source.bundles = bundles
    graph.add("in", source).add("out", sink, "in")
    Pipeline(graph).run()
    assert [set(plane.flat) for plane in sink.planes] == [{100 + pts} for pts in range(11)]


def test_null_waits_for_frames_that_are_queued_some_at_a_time() -> None:
    sink, left, before = Null(), [], host_waits.total
    sink.plan(replace(SPEC, device=GPU))
    frames = list(late(21))
    for number, frame in enumerate(frames, 1):
        sink.write(frame)
        left.append(sum(not frame.ready.done for frame in frames[:number]))  # type: ignore[union-attr]
    assert max(left) == sink.holds == 8
    assert host_waits.total == before + 2
    sink.finish()
    assert all(frame.ready.done for frame in frames)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bundles", "limit", "free", "bundle"),
    [
        (True, None, 4_000_000, 8),
        (True, None, 3_000_000, 4),
        (False, None, 4_000_000, 1),
        (True, 1 << 30, 4_000_000, 1),
        (True, None, 1_000_000, 1),
    ],
)
def test_frames_of_a_file_go_in_bundles_where_there_is_memory_for_it(
    script: Any, bundles: bool, limit: int | None, free: int, bundle: int
) -> None:
    script.free = free  # 26 frames take 479,232, 18 take 331,776
    made = spec(128, 96, name="nv12")
    source = FrameSource(made, [])
    source.bundles = bundles
    graph, up = Graph("test"), Transfer(device="cuda")
    graph.add("in", source).add("up", up, "in").add("out", Null(), "up")
    Pipeline(graph, vram_limit=limit).plan()
    assert source.bundle == bundle
    # On the link behind it, kept by the reader, in its hands, and written to.
    assert up.ring_depth == (2 * bundle) + 8 + 2


def test_frames_to_the_host_go_in_bundles_where_there_is_memory_for_it_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {GPU: 1 << 40, CPU: 1 << 40}
    monkeypatch.setattr(pipeline, "available_bytes", free.__getitem__)
    source = FrameSource(replace(SPEC, device=GPU), [])
    source.bundles = True
    graph = Graph("test").add("in", source).add("out", Reader(), "in")
    for free[CPU], bundle in ((1 << 40, 8), (100_000, 1)):
        Pipeline(graph).plan()
        assert source.bundle == bundle


def test_a_given_capacity_is_kept_where_frames_go_one_at_a_time(script: Any) -> None:
    script.free = 1_000_000
    source = FrameSource(spec(128, 96, name="nv12"), [])
    source.bundles = True
    graph, up = Graph("test"), Transfer(device="cuda")
    graph.add("in", source).add("up", up, "in").add("out", Null(), "up")
    Pipeline(graph, capacity=1).plan()
    assert up.ring_depth == 1 + 8 + 2
