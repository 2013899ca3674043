"""The GPU path on a real GPU. Skipped without one; failed without one where it is required."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidpipe
from tests import mediagen, modelgen
from vidpipe import device as devices
from vidpipe.device import CPU, Device, Ring
from vidpipe.errors import VidpipeError
from vidpipe.frame import Frame, FrameSpec, pixel_format
from vidpipe.function import Function
from vidpipe.graph import Graph
from vidpipe.media.decode import Decode
from vidpipe.model.stage import Model
from vidpipe.pipeline import Pipeline
from vidpipe.stage import FrameSource
from vidpipe.testing import Collect, pattern
from vidpipe.transfer import Mover

GPU = Device("cuda")
SAMPLE = Path(__file__).parent.parent / "samples" / "bigbuckbunny.mp4"

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True, scope="module")
def cupy() -> Iterator[Any]:
    try:
        module = devices.import_cupy(GPU)
        module.cuda.runtime.free(0)
    except VidpipeError as error:
        if os.environ.get("VIDPIPE_REQUIRE_CUDA") == "1":
            pytest.fail(f"VIDPIPE_REQUIRE_CUDA=1, but {error}")
        pytest.skip(str(error))
    yield module
    module.cuda.Device(0).synchronize()


class CollectOnGpu(Collect):
    """Keeps frames where they are."""

    def device_for(self, spec: FrameSpec) -> Device:
        return spec.device


def spec_of(name: str = "nv12", width: int = 64, height: int = 48) -> FrameSpec:
    return FrameSpec(
        width=width,
        height=height,
        format=pixel_format(name),
        time_base=Fraction(1, 25),
        rate=Fraction(25),
    )


def smooth(spec: FrameSpec, pts: int = 0) -> Frame:
    """A picture of waves, as a video has them; noise alone would hide mistakes of phase."""
    planes = []
    top = (1 << spec.format.bits) - 1
    for number, shape in enumerate(spec.plane_shapes()):
        y, x = np.mgrid[: shape[0], : shape[1]]
        wave = np.sin((x + 3 * pts) / 7.0 + number) * np.cos(y / 5.0) * 0.35 + 0.5
        plane = wave if len(shape) == 2 else np.stack((wave, 1 - wave), -1)
        codes = np.round(plane * top).astype(spec.format.dtype)
        planes.append(codes << spec.format.shift)
    return Frame(tuple(planes), spec, pts, duration=1)


def host(frame: Frame) -> list[np.ndarray[Any, Any]]:
    if frame.ready is not None:
        frame.ready.synchronize()
    return [p.get() if hasattr(p, "get") else np.asarray(p) for p in frame.planes]


def run(frames: list[Frame], *stages: Any, sink: Collect | None = None) -> list[Frame]:
    graph = Graph("test").add("in", FrameSource(frames[0].spec, iter(frames)))
    last = "in"
    for number, stage in enumerate(stages):
        graph.add(f"s{number}", stage, last)
        last = f"s{number}"
    sink = sink or Collect()
    graph.add("out", sink, last)
    report = Pipeline(graph).run()
    assert not report.problems
    return sink.frames


def psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], spec: FrameSpec) -> float:
    top = ((1 << spec.format.bits) - 1) << spec.format.shift
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(top**2 / error))


def test_a_slot_is_free_when_the_last_view_is_gone(cupy: Any) -> None:
    ring = Ring([((4, 6), np.uint8), ((2, 3, 2), np.uint8)], 1, GPU)
    slot, planes = ring.lease()
    assert planes[1].data.ptr == planes[0].data.ptr + planes[0].nbytes
    row = planes[0][1]
    del planes
    again, _ = ring.lease()
    assert again.index == 1
    assert ring.grown == 1
    del row
    assert ring.lease()[0] is slot


@pytest.mark.parametrize("name", ["nv12", "yuv420p", "p010le", "yuv444p16le", "gray"])
def test_frames_come_back_from_the_gpu_as_they_went(name: str) -> None:
    spec = spec_of(name, 37, 21)
    frames = [pattern(spec, pts) for pts in range(12)]
    up, down = Mover(spec, GPU, 3), Mover(replace(spec, device=GPU), CPU, 3)
    for frame in frames:
        back = down.move(up.move(frame))
        for before, after in zip(frame.planes, host(back), strict=True):
            np.testing.assert_array_equal(before, after)


def test_the_pipeline_moves_frames_to_the_stage_and_back() -> None:
    def invert(planes: tuple[Any, ...], spec: FrameSpec) -> tuple[Any, ...]:
        assert type(planes[0]).__module__.startswith("cupy")
        return (255 - planes[0], *planes[1:])

    frames = [pattern(spec_of(), pts) for pts in range(20)]
    out = run(frames, Function(function=invert, device="cuda"))
    assert [f.pts for f in out] == list(range(20))
    for before, after in zip(frames, out, strict=True):
        np.testing.assert_array_equal(255 - before.planes[0], after.planes[0])
        np.testing.assert_array_equal(before.planes[1], after.planes[1])


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "format"),
    [("libx264", "yuv420p", "nv12"), ("libx265", "yuv420p10le", "p010le")],
)
def test_nvdec_gives_what_the_cpu_decodes(
    tmp_path: Path, codec: str, pix_fmt: str, format: str
) -> None:
    path = tmp_path / "clip.mkv"
    mediagen.make(path, frames=40, size=(320, 192), codec=codec, pix_fmt=pix_fmt)
    on_cpu = list(vidpipe.read(path))
    decoder = Decode(path=str(path), device="cuda")
    graph = Graph("decode").add("in", decoder)
    sink = CollectOnGpu()
    graph.add("out", sink, "in")
    report = Pipeline(graph).run()
    assert report.stage("in").facts["decoded_on"] == "NVDEC of cuda:0", report.notes
    assert [f.pts for f in sink.frames] == [f.pts for f in on_cpu]
    assert sink.frames[0].spec.format.name == format
    assert sink.frames[0].spec.color == on_cpu[0].spec.color
    shift = sink.frames[0].spec.format.shift
    for ours, theirs in zip(sink.frames, on_cpu, strict=True):
        y, uv = host(ours)
        np.testing.assert_array_equal(y >> shift, theirs.planes[0])
        np.testing.assert_array_equal(uv[..., 0] >> shift, theirs.planes[1])
        np.testing.assert_array_equal(uv[..., 1] >> shift, theirs.planes[2])


def test_what_nvdec_cannot_decode_is_decoded_on_the_cpu_and_said(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    mediagen.make(path, frames=10, size=(64, 48), codec="ffv1", pix_fmt="yuv422p")
    decoder = Decode(path=str(path), device="cuda")
    graph = Graph("decode").add("in", decoder)
    sink = CollectOnGpu()
    graph.add("out", sink, "in")
    report = Pipeline(graph).run()
    assert any("was decoded on the CPU: NVDEC" in note for note in report.notes)
    for ours, theirs in zip(sink.frames, vidpipe.read(path), strict=True):
        assert ours.spec.device == GPU
        for a, b in zip(host(ours), theirs.planes, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["nv12", "p010le", "yuv420p", "yuv422p10le", "yuv444p", "gray"])
@pytest.mark.parametrize("model", ["nano-2x", "clean-1x-nano", "clean-2x-fast"])
def test_models_give_what_the_cpu_gives(name: str, model: str) -> None:
    frames = [smooth(spec_of(name, 98, 62), pts) for pts in range(9)]
    expected = run(frames, Model(model=model, device="cpu"))
    got = run(frames, Model(model=model, device="cuda"))
    for a, b in zip(expected, got, strict=True):
        assert a.pts == b.pts
        assert replace(a.spec) == b.spec
        for plane, other in zip(a.planes, host(b), strict=True):
            assert psnr(np.asarray(plane), other, a.spec) > 50


@pytest.mark.parametrize("name", ["nv12", "p010le", "yuv420p", "yuv444p"])
def test_the_kernels_equal_the_graph_they_stand_for(name: str) -> None:
    from vidpipe.model.compile import compile_model
    from vidpipe.model.descriptor import describe, find_model
    from vidpipe.model.kernels import gpu_session

    model = describe(find_model("nano-2x"))
    spec = replace(spec_of(name, 102, 66), device=GPU)
    compiled = compile_model(model, spec, portable=True, widen=False, half=True)
    frame = Mover(replace(spec, device=CPU), GPU, 1).move(smooth(replace(spec, device=CPU)))
    results = []
    for kernels in (False, True):
        stream = devices.new_stream(GPU)
        shapes = [(t.plane_shape, t.dtype) for t in compiled.outputs]
        slot = Ring(shapes, 1, GPU).slots[0]
        session = gpu_session(model, compiled, stream=stream, kernels=kernels)
        session.bind(0, slot.buffers)
        assert session.prepare().used
        frame.wait(stream)
        event = session.run(0, frame.planes, stream)
        assert event is not None
        event.synchronize()
        results.append([b.get() >> spec.format.shift for b in slot.buffers])
        session.close()
    for graph, kernel in zip(*results, strict=True):
        difference = np.abs(graph.astype(np.int64) - kernel.astype(np.int64))
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 1e-3


def test_two_models_in_a_row_and_a_function_between_them() -> None:
    def same(planes: tuple[Any, ...], spec: FrameSpec) -> tuple[Any, ...]:
        return planes

    frames = [smooth(spec_of("nv12", 96, 64), pts) for pts in range(30)]

    def chain(where: str) -> list[Frame]:
        return run(
            frames,
            Model(model="clean-1x-nano", device=where),
            Function(function=same, device=where),
            Model(model="nano-2x", device=where),
        )

    for a, b in zip(chain("cpu"), chain("cuda"), strict=True):
        for plane, other in zip(a.planes, host(b), strict=True):
            assert psnr(np.asarray(plane), other, a.spec) > 50


def test_strength_changes_between_frames() -> None:
    spec = spec_of("nv12", 96, 64)
    frame = pattern(spec)
    stage = Model(model="clean-1x-nano", strength=0.0, device="cuda")
    moved = Mover(spec, GPU, 1).move(frame)
    on_gpu = moved.spec
    stage.plan(on_gpu)
    stage.open()
    (still,) = stage.process(moved)
    difference = host(still)[0].astype(int) - frame.planes[0].astype(int)
    assert np.abs(difference).max() <= 1
    stage.set_strength(1.0)
    (changed,) = stage.process(moved)
    assert np.abs(host(changed)[0].astype(int) - frame.planes[0].astype(int)).max() > 5
    stage.close()


def test_tiles_give_what_the_whole_picture_gives() -> None:
    frames = [smooth(spec_of("nv12", 320, 192), pts) for pts in range(4)]
    whole = run(frames, Model(model="nano-2x", device="cuda", tile="off"))
    tiles = run(frames, Model(model="nano-2x", device="cuda", tile="160x128"))
    for a, b in zip(whole, tiles, strict=True):
        for plane, other in zip(host(a), host(b), strict=True):
            assert np.abs(plane.astype(int) - other.astype(int)).max() <= 1


def test_little_memory_leads_to_tiles() -> None:
    frames = [smooth(spec_of("nv12", 640, 384), pts) for pts in range(4)]
    stage = Model(model="fast-2x", device="cuda", memory_limit="16M")
    limited = run(frames, stage)
    assert stage.report()["tiles"]
    whole = run(frames, Model(model="fast-2x", device="cuda"))
    for a, b in zip(whole, limited, strict=True):
        for plane, other in zip(host(a), host(b), strict=True):
            assert psnr(plane, other, a.spec) > 50


@pytest.mark.parametrize("graph", [True, False])
def test_a_session_replays_only_what_equals_the_plain_run(graph: bool) -> None:
    stage = Model(model="nano-2x", device="cuda")
    run([smooth(spec_of("nv12", 96, 64), pts) for pts in range(6)], stage)
    use = stage.report()["cuda_graph"]
    assert use["used"], use["reason"]
    assert use["replay_ms"] > 0
    assert stage.report()["nodes"].keys() == {"CUDAExecutionProvider"}


def test_an_rgb_model_runs_as_one_graph(tmp_path: Path) -> None:
    path = modelgen.random_net(tmp_path / "rgb.onnx", 2, 3, depth=2)
    frames = [smooth(spec_of("nv12", 96, 64), pts) for pts in range(6)]
    expected = run(frames, Model(model=str(path), device="cpu"))
    got = run(frames, Model(model=str(path), device="cuda"))
    for a, b in zip(expected, got, strict=True):
        for plane, other in zip(a.planes, host(b), strict=True):
            assert psnr(np.asarray(plane), other, a.spec) > 45


def test_a_file_comes_out_as_on_the_cpu(tmp_path: Path) -> None:
    results = {}
    for where in ("cpu", "cuda"):
        path = tmp_path / f"{where}.mkv"
        options: dict[str, Any] = {"model": "clean-2x-nano", "device": where}
        lossless = {"codec": "ffv1", "pix_fmt": "yuv420p"}
        report = vidpipe.enhance(SAMPLE, path, duration_s=1.0, **options, **lossless)
        assert not report.problems
        results[where] = list(vidpipe.read(path))
    assert [f.pts for f in results["cpu"]] == [f.pts for f in results["cuda"]]
    for a, b in zip(results["cpu"], results["cuda"], strict=True):
        for plane, other in zip(a.planes, b.planes, strict=True):
            assert psnr(np.asarray(plane), np.asarray(other), a.spec) > 50


def test_no_thread_but_the_last_waits_for_the_gpu_and_nothing_is_allocated(
    cupy: Any, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mkv"
    mediagen.make(path, frames=300, size=(320, 192), codec="libx264", pix_fmt="yuv420p")
    graph = Graph("steady").add("in", Decode(path=str(path), device="cuda"))
    graph.add("clean", Model(model="clean-1x-nano", device="cuda"), "in")
    graph.add("double", Model(model="nano-2x", device="cuda"), "clean")

    pool = cupy.get_default_memory_pool()
    seen: list[tuple[int, int, int]] = []

    class Watch(CollectOnGpu):
        def write(self, frame: Frame) -> None:
            assert frame.ready is not None
            frame.ready.synchronize()
            waits = sum(
                n for t, n in devices.host_waits.by_thread.items() if not t.endswith("-out")
            )
            seen.append((pool.total_bytes(), waits, frame.pts))

    graph.add("out", Watch(), "double")
    Pipeline(graph).run()
    assert len(seen) == 300
    # The first frames verify the graphs and fill CuPy's pool; at the end streams are closed.
    steady = seen[60:-20]
    assert len({total for total, _, _ in steady}) == 1
    assert len({waits for _, waits, _ in steady}) == 1


def test_interlaced_pictures_in_the_middle_go_on_in_software(tmp_path: Path) -> None:
    first, second, both = (tmp_path / n for n in ("a.ts", "b.ts", "both.ts"))
    for path, interlaced in ((first, False), (second, True)):
        mediagen.make(path, codec="mpeg2video", frames=30, size=(320, 192), interlaced=interlaced)
    both.write_bytes(first.read_bytes() + second.read_bytes())
    expected = list(vidpipe.read(both))
    graph = Graph("decode").add("in", Decode(path=str(both), device="cuda"))
    sink = CollectOnGpu()
    graph.add("out", sink, "in")
    report = Pipeline(graph).run()
    assert [f.pts for f in sink.frames] == [f.pts for f in expected], report.notes
    for ours, theirs in zip(sink.frames, expected, strict=True):
        # MPEG-2 leaves the rounding of the inverse DCT open, and the errors add up.
        assert psnr(host(ours)[0], np.asarray(theirs.planes[0]), theirs.spec) > 45


def test_a_memory_limit_shortens_rings_and_cuts_tiles() -> None:
    spec = spec_of("nv12", 1280, 720)
    frames = [smooth(spec, pts) for pts in range(6)]

    def limited(bytes_: int | None) -> tuple[list[Frame], Any]:
        graph = Graph("limited").add("in", FrameSource(spec, iter(frames)))
        graph.add("double", Model(model="fast-2x", device="cuda"), "in")
        sink = Collect()
        graph.add("out", sink, "double")
        report = Pipeline(graph, vram_limit=bytes_).run()
        assert not report.problems
        return sink.frames, report

    whole, report = limited(None)
    assert not report.stage("double").facts["tiles"]
    assert not report.notes
    tiles, report = limited(50 << 20)
    assert report.stage("double").facts["tiles"]
    assert any("are shorter" in note for note in report.notes)
    for a, b in zip(whole, tiles, strict=True):
        for plane, other in zip(host(a), host(b), strict=True):
            assert psnr(plane, other, a.spec) > 50
    with pytest.raises(VidpipeError, match="the frames alone need"):
        limited(4 << 20)


@pytest.mark.parametrize("decoders", [1, 2])
def test_a_split_file_is_joined_without_a_seam(cupy: Any, tmp_path: Path, decoders: int) -> None:
    from vidpipe.api import build_graph
    from vidpipe.segments import SplitRun

    clip = tmp_path / "clip.mp4"
    options = {"g": "25", "bf": "3"}
    mediagen.make(clip, frames=200, size=(320, 192), options=options)
    count = min(2, cupy.cuda.runtime.getDeviceCount())
    if count * decoders == 1:
        pytest.skip("one GPU")
    wanted: dict[str, Any] = {"model": "nano-2x", "codec": "ffv1", "pix_fmt": "yuv420p"}
    whole, split = tmp_path / "whole.mkv", tmp_path / "split.mkv"
    vidpipe.enhance(clip, whole, device="cuda:0", **wanted)
    graph = build_graph(clip, split, device="cuda:0", **wanted)
    gpus = [Device("cuda", i) for i in range(count)]
    report = SplitRun(graph, gpus, decoders=decoders, least_s=1.0).run()
    assert not report.problems
    one, many = list(vidpipe.read(whole)), list(vidpipe.read(split))
    assert [f.pts for f in one] == [f.pts for f in many]
    for a, b in zip(one, many, strict=True):
        for plane, other in zip(a.planes, b.planes, strict=True):
            assert np.abs(plane.astype(int) - other.astype(int)).max() <= 1


@pytest.fixture
def long_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """1080p, 1,200 frames, a key frame every second; worth several decoders."""
    from vidpipe import decoders
    from vidpipe.bench import clip

    monkeypatch.setattr(decoders, "WORTH_FRAMES", 1000)
    monkeypatch.setattr(clip, "clip_folder", lambda: tmp_path)
    return clip.synthetic_clip(1920, 1080, drawn=60, rounds=20)


def to_null(source: Path, *models: str) -> Graph:
    graph = Graph("to null").add("in", "decode", path=str(source))
    last = "in"
    for number, model in enumerate(models):
        graph.add(f"s{number}", "model", last, model=model)
        last = f"s{number}"
    return graph.add("out", "null", last)


def test_all_gpus_take_several_decoders_where_decoding_is_the_bound(long_clip: Path) -> None:
    from vidpipe import decoders
    from vidpipe.clock import MonotonicClock
    from vidpipe.segments import SplitRun

    placed = to_null(long_clip)
    placed.set("in", "device", "cuda:0")
    sample = decoders.Sample(placed, "in", "out", MonotonicClock())
    one, two = sample.decode(1), sample.decode(2)
    sample.close()
    assert one > 0
    if two < 1.5 * one:
        pytest.skip("one decoder is as fast as two")
    run = SplitRun(to_null(long_clip), [GPU], decoders=None)
    report = run.run()
    assert len(run.devices) >= 2
    assert not report.problems
    assert report.stage("out").frames_in == 1200
    assert f"no models: {len(run.devices)} decoders on each GPU" in report.notes[0]
    rows = report.stage("in").facts["workers"]
    assert all(row["frames"] for row in rows)
    assert report.stage("in").facts["decoded_on"] == "NVDEC of cuda:0"


def test_one_decoder_where_a_model_or_the_host_is_the_bound(
    long_clip: Path, tmp_path: Path
) -> None:
    from vidpipe.segments import SplitRun

    run = SplitRun(to_null(long_clip, "quality-2x"), [GPU], decoders=None)
    run.plan()
    run.abort()
    assert run.devices == [GPU]
    assert run.notes[0].endswith(": 1 decoder on each GPU")
    on_host = Graph("on the host").add("in", "decode", path=str(long_clip))
    on_host.add("out", "encode", "in", path=str(tmp_path / "o.mp4"), codec="libx264")
    run = SplitRun(on_host, [GPU], decoders=None)
    run.plan()
    run.abort()
    assert (run.devices, run.notes) == ([GPU], [])


def test_two_decoders_of_one_gpu_to_nothing(long_clip: Path) -> None:
    from vidpipe.bench.split import Watched

    run = Watched(to_null(long_clip, "fast-2x"), [GPU, GPU])
    report = run.run()
    assert not report.problems
    assert any(note.endswith("parts on cuda:0, cuda:0") for note in report.notes)
    expected = [f.pts * f.spec.time_base for f in vidpipe.read(long_clip)]
    assert sorted(time for watch in run.watches for time in watch.times) == expected
    for watch in run.watches:
        assert watch.times == sorted(watch.times)
        assert watch.device == GPU


def test_a_thread_may_wait_for_the_gpu_while_another_captures_a_graph(cupy: Any) -> None:
    # As ONNX Runtime captures: in the mode in which a wait of another thread makes both fail.
    capturing, waited = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            stream = devices.new_stream(GPU)
            event = stream.record()
            capturing.wait()
            event.synchronize()
            stream.synchronize()
            Ring([((8, 8), np.uint8)], 1, GPU)
        except BaseException as error:
            errors.append(error)
        finally:
            waited.set()

    thread = threading.Thread(target=wait)
    thread.start()
    stream = cupy.cuda.Stream(non_blocking=True)
    values = cupy.zeros(4, cupy.float32)
    with stream:
        values += 1  # compiled here, not in the capture
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        values += 1
        capturing.set()
        waited.wait()
        graph = stream.end_capture()
    thread.join()
    assert not errors
    graph.launch(stream)
    stream.synchronize()
    assert values.get().tolist() == [2.0] * 4
