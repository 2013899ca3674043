"""Profiles: what is in them, and that times of a GPU land on the host's time line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vidpipe import trace
from vidpipe.errors import OutputError
from vidpipe.frame import Frame
from vidpipe.graph import Graph
from vidpipe.pipeline import Pipeline
from vidpipe.stage import Null
from vidpipe.testing import Collect, Identity, ManualClock, patterns

FRAMES = 12

pytestmark = pytest.mark.usefixtures("no_leaks")


def spans(profile: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The spans of each track, in the order of the file."""
    tracks = defaultdict(list)
    for event in profile["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def names(profile: dict[str, Any], kind: str = "thread_name") -> dict[tuple[int, int], str]:
    return {
        (e["pid"], e.get("tid", 0)): e["args"]["name"]
        for e in profile["traceEvents"]
        if e["name"] == kind
    }


def check_nesting(track: list[dict[str, Any]]) -> None:
    """Two spans of one track are apart, or one lies within the other."""
    open_until: list[float] = []
    for event in sorted(track, key=lambda e: (e["ts"], -e["dur"])):
        while open_until and open_until[-1] <= event["ts"] + 0.002:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + 0.002, event
        open_until.append(end)


def check(profile: dict[str, Any], actors: Iterable[str], frames: int) -> None:
    """What every profile of a run must be."""
    times = [e["ts"] for e in profile["traceEvents"] if "ts" in e]
    assert times == sorted(times)
    assert all(t >= 0 for t in times)
    tracks, titles = spans(profile), names(profile)
    lanes = {place: name for place, name in titles.items() if ": lane " in name}
    assert sorted(set(titles.values()) - set(lanes.values())) == sorted(actors)
    if lanes:  # more than one frame at once: who ran which
        runs = [e for place in lanes for e in tracks[place]]
        assert sorted(e["args"]["pts"] for e in runs) == sorted({e["args"]["pts"] for e in runs})
        assert len(runs) == frames
        assert {e["name"] for e in runs} == {"run"}
    for place, name in titles.items():
        if place in lanes:
            continue
        check_nesting(tracks[place])
        seen = [e["name"] for e in tracks[place]]
        assert seen.count("open") == 1
        if name == "source":
            assert seen.count("frames") == frames + 1  # the last one finds the end
            continue
        assert seen.count("frame") == frames
        pts = [e["args"]["pts"] for e in tracks[place] if e["name"] == "frame"]
        assert pts == sorted(set(pts))


def test_a_profile_has_every_actor_and_every_frame(sample: Path) -> None:
    tracer = trace.Tracer()
    graph = Graph("small").add("source", "decode", path=str(sample), duration_s=0.4)
    graph.add("half", "resize", "source", scale=0.25).add("model", "model", "half", model="nano-2x")
    graph.add("sink", "null", "model")
    pipeline = Pipeline(graph, tracer=tracer)
    report = pipeline.run()
    profile = json.loads(json.dumps(tracer.to_dict()))
    frames = report.stage("sink").frames_in
    assert frames == 10
    check(profile, ["source", "half", "model", "sink"], frames)
    (run,) = profile["otherData"]["runs"]
    described = {stage["stage"]: stage for stage in run["stages"]}
    assert described["model"]["nodes"] == report.stage("model").facts["nodes"]
    assert described["model"]["nodes"]["CPUExecutionProvider"] > 0
    # The work lies within its frame, and sums up to what the report says.
    place = next(p for p, n in names(profile).items() if n == "model")
    work = [e for e in spans(profile)[place] if e["name"] in ("process", "ready", "flush")]
    busy_s = sum(e["dur"] for e in work) / 1e6 + pipeline.actor("model").aside_s
    assert busy_s == pytest.approx(report.stage("model").busy_s, abs=1e-6 * len(work))
    queues = [e for e in profile["traceEvents"] if e["ph"] == "C"]
    assert {e["name"] for e in queues} == {f"queue to {n}" for n in ("half", "model", "sink")}
    assert all(0 <= e["args"]["value"] <= 2 for e in queues)


def test_waits_and_work_are_as_long_as_they_were() -> None:
    clock = ManualClock(100.0)

    class Works(Identity):
        def process(self, frame: Frame) -> Iterator[Frame]:
            clock.advance(0.25)
            yield frame
            clock.advance(0.5)

    tracer = trace.Tracer(clock=clock)
    graph = Graph().add("source", patterns(1)).add("work", Works(), "source")
    Pipeline(graph.add("sink", Collect(), "work"), clock=clock, tracer=tracer).run()
    profile = tracer.to_dict()
    place = next(p for p, n in names(profile).items() if n == "work")
    found = [e for e in spans(profile)[place] if e["name"] == "process"]
    assert [e["dur"] for e in found] == [250000.0, 500000.0]
    (whole,) = [e for e in spans(profile)[place] if e["name"] == "frame"]
    assert whole["dur"] == 750000.0


def test_two_pipelines_share_a_profile_side_by_side() -> None:
    tracer = trace.Tracer()
    for title in ("first", "second"):
        graph = Graph(title).add("source", patterns(3)).add("sink", Null(), "source")
        Pipeline(graph, tracer=tracer).run()
    profile = tracer.to_dict()
    titles = names(profile, "process_name")
    assert [n for n in titles.values() if "GPU" not in n] == ["first", "second"]
    assert len({pid for pid, _ in spans(profile)}) == 2
    assert [run["graph"] for run in profile["otherData"]["runs"]] == ["first", "second"]


def test_without_a_profile_no_actor_has_a_track() -> None:
    seen: list[object] = []

    class Looks(Identity):
        def process(self, frame: Frame) -> Iterable[Frame]:
            seen.append(trace.current())
            return (frame,)

    for tracer in (None, trace.Tracer()):
        graph = Graph().add("source", patterns(1)).add("looks", Looks(), "source")
        Pipeline(graph.add("sink", Collect(), "looks"), tracer=tracer).run()
    assert seen[0] is None
    assert isinstance(seen[1], trace.Track)
    stream = object()
    assert trace.follow(stream) is stream


def test_the_command_line_writes_a_profile(sample: Path, tmp_path: Path) -> None:
    profile = tmp_path / "trace.json"
    command = [sys.executable, "-m", "vidpipe", "run", sample, tmp_path / "out.mp4"]
    command += ["--duration", "0.2", "--profile", profile]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    check(json.loads(profile.read_text()), ["source", "model", "sink"], 5)


def test_a_profile_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        trace.Tracer(tmp_path / "none" / "trace.json")
    tracer = trace.Tracer(tmp_path)
    with pytest.raises(OutputError):
        tracer.write()


# -- a GPU, in the manner of CuPy --------------------------------------------------------------


class Gpu:
    """A GPU whose clock runs a little fast, and began at another time."""

    RATE = 1 + 50e-6

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.busy_until_s = 0.0
        self.waits = 0

    def now_ms(self) -> float:
        return 7e6 + 1000 * max(self.clock.now_s(), self.busy_until_s) * self.RATE


class GpuEvent:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.at_ms: float | None = None

    def record(self, stream: GpuStream) -> None:
        self.at_ms = stream.gpu.now_ms()

    def synchronize(self) -> None:
        self.gpu.waits += 1

    @property
    def done(self) -> bool:
        assert self.at_ms is not None
        return self.at_ms <= 7e6 + 1000 * self.gpu.clock.now_s() * Gpu.RATE


class GpuStream:
    """A stream on which work is queued by `work`."""

    device_id = 0

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.waited: list[object] = []
        self.recorded: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record(self, event: object = None) -> object:
        self.recorded.append(event)
        return "recorded"

    def work(self, seconds: float) -> None:
        self.gpu.busy_until_s = max(self.gpu.clock.now_s(), self.gpu.busy_until_s) + seconds


class Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class GpuTracer(trace.Tracer):
    made = 0

    def _cuda(self, stream: Any) -> Any:
        def event() -> GpuEvent:
            self.made += 1
            return GpuEvent(stream.gpu)

        def elapsed_ms(one: GpuEvent, two: GpuEvent) -> float:
            assert one.at_ms is not None
            assert two.at_ms is not None
            return two.at_ms - one.at_ms

        return event, elapsed_ms, Nothing()


def test_gpu_work_is_on_the_time_line_of_the_host() -> None:
    clock = ManualClock(50.0)
    gpu = Gpu(clock)
    tracer = GpuTracer(clock=clock)
    track = tracer.track(tracer.group("run"), "model", "model")
    stream = GpuStream(gpu)
    trace.use(track)
    try:
        assert trace.follow(stream) is stream
    finally:
        trace.use(None)
    anchored = gpu.waits
    expected = []
    for number in range(3000):
        clock.advance(0.010)
        track.pts = number
        stream.wait_event("decoded")  # type: ignore[attr-defined]
        stream.wait_event("free")
        expected.append((clock.now_s() - 50.0) * 1e6)
        stream.work(0.004)
        assert stream.record() == "recorded"
        stream.record("second")  # of no work
    assert gpu.waits == anchored  # nobody waited while frames flowed
    assert tracer.made < 1000  # events are used again
    clock.advance(1.0)
    profile = json.loads(json.dumps(tracer.to_dict()))
    (place,) = spans(profile)
    assert names(profile)[place] == "model (model)"
    assert names(profile, "process_name")[place[0], 0] == "run: GPU"
    found = spans(profile)[place]
    check_nesting(found)
    assert [e["args"]["pts"] for e in found] == list(range(3000))
    assert [e["ts"] for e in found] == pytest.approx(expected, abs=2.0)
    assert {round(e["dur"]) for e in found} == {4000}
    # The stream is as it was, and what it was told went on to it.
    assert stream.waited[:2] == ["decoded", "free"]
    assert stream.recorded[:2] == [None, "second"]
    assert "wait_event" not in vars(stream) or stream.wait_event.__self__ is stream


def test_work_that_is_not_over_is_read_later() -> None:
    clock = ManualClock()
    gpu = Gpu(clock)
    tracer = GpuTracer(clock=clock)
    stream = GpuStream(gpu)
    tracer.track(tracer.group("run"), "copy", "copy").follow(stream)
    for _ in range(600):
        stream.wait_event("input")
        stream.work(1.0)
        stream.record()
    clock.advance(1000.0)
    gpu.busy_until_s = 0.0
    (found,) = spans(tracer.to_dict()).values()
    assert len(found) == 600
    assert [round(e["ts"] / 1e6, 3) for e in found] == list(range(600))


def test_streams_of_one_gpu_stand_beside_each_other_as_they_ran() -> None:
    class Late(ManualClock):
        """Every look at the clock comes later, as on a busy machine, and each by more."""

        def __init__(self) -> None:
            super().__init__()
            self.looks = 0

        def now_s(self) -> float:
            self.looks += 1
            return super().now_s() + 1e-3 * (self.looks % 7)

    clock = ManualClock()
    gpu = Gpu(clock)
    tracer = GpuTracer(clock=Late())
    first, second = GpuStream(gpu), GpuStream(gpu)
    group = tracer.group("run")
    tracer.track(group, "model", "model").follow(first)
    clock.advance(5.0)
    tracer.track(group, "copy", "copy").follow(second)
    for number in range(600):
        clock.advance(0.010)
        for stream in (first, second):
            stream.wait_event("input")
            stream.work(0.001 * (1 + number % 3))
            stream.record()
    clock.advance(1.0)
    model, copy = spans(tracer.to_dict()).values()
    assert len(model) == len(copy) == 600
    ends = [e["ts"] + e["dur"] for e in model]
    assert [e["ts"] for e in copy] == pytest.approx(ends, abs=0.01)


def test_nvtx_ranges_are_balanced() -> None:
    class Nvtx:
        def __init__(self) -> None:
            self.depth = self.deepest = 0
            self.named: list[str] = []

        def RangePush(self, name: str) -> None:  # noqa: N802
            self.named.append(name)
            self.depth += 1
            self.deepest = max(self.deepest, self.depth)

        def RangePop(self) -> None:  # noqa: N802
            self.depth -= 1

    nvtx = Nvtx()

    class Marked(trace.Tracer):
        def track(self, *arguments: Any, **options: Any) -> trace.Track:
            track = super().track(*arguments, **options)
            if track.name == "same":
                track.nvtx = nvtx
            return track

    graph = Graph().add("source", patterns(FRAMES)).add("same", Identity(), "source")
    Pipeline(graph.add("sink", Collect(), "same"), tracer=Marked()).run()
    assert nvtx.depth == 0
    assert nvtx.deepest == 1
    assert nvtx.named.count("same: process") == 2 * FRAMES  # to the frame, and to the end


# -- a real one --------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_profile_of_a_run_on_a_gpu(sample: Path) -> None:
    tracer = trace.Tracer()
    graph = Graph("gpu").add("source", "decode", path=str(sample), device="cuda")
    graph.add("model", "model", "source", model="fast-2x").add("sink", Collect(), "model")
    report = Pipeline(graph, tracer=tracer).run()
    frames = report.stage("sink").frames_in
    profile = json.loads(json.dumps(tracer.to_dict()))
    titles = names(profile)
    tracks = spans(profile)
    gpu = {titles[place]: track for place, track in tracks.items() if "(" in titles[place]}
    assert {"model (model)", "model-to-cpu (transfer)"} <= set(gpu)
    begin = min(e["ts"] for e in tracks[next(p for p, n in titles.items() if n == "sink")])
    end = max(e["ts"] + e["dur"] for track in tracks.values() for e in track)
    for name in ("model (model)", "model-to-cpu (transfer)"):
        track = [e for e in gpu[name] if "pts" in e.get("args", {})]
        check_nesting(track)
        assert len({e["args"]["pts"] for e in track}) == frames
        assert all(begin <= e["ts"] <= end and e["dur"] >= 0 for e in track)
    # A frame is copied to the host after the model has made it.
    made = {e["args"]["pts"]: e["ts"] + e["dur"] for e in gpu["model (model)"] if "args" in e}
    for event in gpu["model-to-cpu (transfer)"]:
        assert event["ts"] >= made[event["args"]["pts"]] - 50
