"""A file in parts on several devices equals the same file on one."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from mediagen import KEYS_X264 as X264
from mediagen import Audio, Subtitles, make

from vidpipe import decoders
from vidpipe.api import make_run
from vidpipe.device import CPU, Device
from vidpipe.errors import Cancelled, DeviceError, GraphError, InputError, OutputError, VidpipeError
from vidpipe.frame import Frame
from vidpipe.graph import Graph
from vidpipe.media import join, ranges
from vidpipe.media.decode import Decode, _NotInHardware
from vidpipe.media.ranges import Schedule, Segment, cut, starts_clean
from vidpipe.pipeline import Pipeline, Report
from vidpipe.segments import SplitRun, devices_of, run_split
from vidpipe.stage import Null, Sink

X265 = "keyint=20:min-keyint=20:scenecut=0:bframes=4:b-adapt=0:log-level=error"


def graph(source: Path, out: Path, decode: dict[str, Any] | None = None, **encode: Any) -> Graph:
    built = Graph("test").add("source", "decode", path=str(source), **(decode or {}))
    return built.add("sink", "encode", "source", path=str(out), **encode)


def packets(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [(p.pts, p.dts) for p in container.demux(container.streams.video[0]) if p.size]


def pictures(path: Path) -> list[tuple[int | None, Any]]:
    with av.open(str(path)) as container:
        return [(f.pts, f.to_ndarray()) for f in container.decode(video=0)]


def both(
    source: Path,
    folder: Path,
    suffix: str = ".mkv",
    decode: dict[str, Any] | None = None,
    *,
    parts: int | None = None,
    **encode: Any,
) -> tuple[Report, Report]:
    """Run a file on one device and on two, and compare all frames and times."""
    encode = {"codec": "ffv1", **encode}
    one, two = folder / f"one{suffix}", folder / f"two{suffix}"
    whole = Pipeline(graph(source, one, decode, **encode)).run()
    run = SplitRun(graph(source, two, decode, **encode), [CPU, CPU], least_s=0.7)
    split = run.run()
    assert split.problems == whole.problems
    a, b = packets(one), packets(two)
    assert sorted(p[0] for p in b) == sorted(p[0] for p in a)
    dts = [p[1] for p in b if p[1] is not None]
    assert dts == [p[1] for p in a if p[1] is not None]
    assert all(x < y for x, y in pairwise(dts))
    assert all(p[1] is None or p[1] <= p[0] for p in b)
    for (time, picture), (time_2, picture_2) in zip(pictures(one), pictures(two), strict=True):
        assert time == time_2
        assert np.array_equal(picture, picture_2)
    for name in ("frames", "first_pts", "last_pts", "duration_s", "gaps_s", "complete", "damaged"):
        assert split.stage("source").facts[name] == whole.stage("source").facts[name], name
    same = ("frames", "packets", "duration_s", "streams", "chapters", "first_pts", "last_pts")
    for name in same:
        assert split.stage("sink").facts[name] == whole.stage("sink").facts[name], name
    assert split.media_s == pytest.approx(whole.media_s)
    if parts is not None:
        assert f"{parts} parts on cpu, cpu" in split.notes
    return whole, split


@pytest.mark.parametrize(
    ("codec", "options", "suffix"),
    [
        ("libx264", X264, ".mp4"),
        ("libx264", X264, ".mkv"),
        ("libx264", X264, ".ts"),
        ("libx264", {**X264, "x264-params": "open-gop=1"}, ".mp4"),
        ("libx265", {"preset": "ultrafast", "x265-params": X265 + ":open-gop=0"}, ".mp4"),
        ("libx265", {"preset": "ultrafast", "x265-params": X265 + ":open-gop=1"}, ".mp4"),
        ("libx265", {"preset": "ultrafast", "x265-params": X265 + ":open-gop=1"}, ".mkv"),
        ("mpeg2video", {"g": "15", "bf": "2", "b": "2M"}, ".ts"),
        ("libvpx-vp9", {"g": "20", "cpu-used": "8", "deadline": "realtime"}, ".webm"),
        ("libsvtav1", {"g": "20", "preset": "12"}, ".mkv"),
    ],
)
def test_same_frames_and_times(
    tmp_path: Path, codec: str, options: dict[str, str], suffix: str
) -> None:
    source = make(tmp_path / f"in{suffix}", codec=codec, options=options, frames=100)
    run = SplitRun(graph(source, tmp_path / "t.mkv", codec="ffv1"), [CPU, CPU], least_s=0.7)
    run.plan()
    assert run._join is not None, run.notes
    _, split = both(source, tmp_path)
    rows = split.stage("source").facts["workers"]
    assert sum(row["frames"] for row in rows) == 100
    assert len(rows) == 2


def test_open_gop_really_has_leading_pictures(tmp_path: Path) -> None:
    """So the test above is about something."""
    options = {"preset": "ultrafast", "x265-params": X265 + ":open-gop=1"}
    source = make(tmp_path / "in.mp4", codec="libx265", options=options, frames=100)
    with av.open(str(source)) as container:
        times = [p for p in container.demux(container.streams.video[0]) if p.size]
        keys = [i for i, p in enumerate(times) if p.is_keyframe]
        late = [i for i in keys[1:] if times[i + 1].pts is not None]
        assert any((times[i + 1].pts or 0) < (times[i].pts or 0) for i in late)


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_b_frames_join_without_a_seam(tmp_path: Path, codec: str, suffix: str) -> None:
    """Decoding times rise over the seam, and are those of one run where the rate is constant."""
    source = make(tmp_path / "in.mp4", options=X264, frames=100)
    options: dict[str, Any] = {"crf": 0.0, "codec": "h264", "preset": "medium"}
    if codec == "hevc":
        params = {"x265-params": "lossless=1"}
        options = {"codec": "hevc", "preset": "fast", "encoder_options": params}
    both(source, tmp_path, suffix, parts=5, **options)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate(tmp_path: Path, suffix: str) -> None:
    """B-frames and uneven times: no rate says where decoding times belong."""
    random = np.random.default_rng(1)
    times = np.cumsum(random.integers(1, 90, 120)).tolist()
    source = make(
        tmp_path / "in.mkv", options=X264, pts=times, frames=120, time_base=Fraction(1, 1000)
    )
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    encode: dict[str, Any] = {"codec": "h264", "crf": 0.0, "preset": "medium"}
    Pipeline(graph(source, one, **encode)).run()
    report = SplitRun(graph(source, two, **encode), [CPU, CPU, CPU], least_s=0.7).run()
    assert report.problems == []
    assert any("parts on cpu, cpu, cpu" in note for note in report.notes)
    got, expected = pictures(two), pictures(one)
    assert [t for t, _ in got] == [t for t, _ in expected]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))
    dts = [p[1] for p in packets(two) if p[1] is not None]
    assert all(a < b for a, b in pairwise(dts))


def test_everything_beside_the_picture_is_there(tmp_path: Path) -> None:
    source = make(
        tmp_path / "in.mkv",
        options=X264,
        frames=100,
        audio=[Audio(clicks_s=(0.5, 2.5)), Audio("flac", late_s=0.3)],
        subtitles=[Subtitles()],
        chapters=[(0, 2, "One"), (2, 4, "Two")],
        attachments=[("f.ttf", "font/ttf", b"x" * 100)],
        metadata={"title": "A"},
        rotation=90,
        sample_aspect_ratio=Fraction(4, 3),
    )
    _, split = both(source, tmp_path, codec="h264", crf=0.0, parts=5)
    kinds = [s["kind"] for s in split.stage("sink").facts["streams"]]
    assert sorted(kinds) == ["attachment", "audio", "audio", "subtitle"]
    with av.open(str(tmp_path / "two.mkv")) as container:
        assert container.metadata["title"] == "A"
        assert len(container.chapters()) == 2


@pytest.mark.parametrize(
    "excerpt", [{"start_s": 0.9}, {"duration_s": 2.3}, {"start_s": 0.5, "duration_s": 2.9}]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_excerpts(tmp_path: Path, excerpt: dict[str, float], suffix: str) -> None:
    source = make(tmp_path / "in.mp4", options=X264, frames=100, audio=[Audio()])
    _, split = both(source, tmp_path, suffix, excerpt, codec="h264", crf=0.0)
    assert any("parts on" in note for note in split.notes)


def test_a_file_with_one_key_frame_runs_on_one_device(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", options={"g": "999", "sc_threshold": "0"}, frames=60)
    _, split = both(source, tmp_path)
    assert any("was not split: it has no key frames" in note for note in split.notes)


def test_gradual_refresh_is_not_cut(tmp_path: Path) -> None:
    """Such a stream flags recovery points, after which pictures heal little by little."""
    options = {**X264, "bf": "0", "x264-params": "intra-refresh=1"}
    source = make(tmp_path / "in.ts", options=options, frames=100)
    decode = Decode(path=str(source))
    decode.plan()
    segments = list(cut(decode, 0.7))
    if len(segments) > 1:
        assert not starts_clean(decode, segments[1])
    _, split = both(source, tmp_path)
    assert any("was not split" in note for note in split.notes)


def test_interlaced_pictures_are_not_cut(tmp_path: Path) -> None:
    options = {"g": "12", "b": "2M"}
    source = make(
        tmp_path / "in.ts", codec="mpeg2video", options=options, interlaced=True, frames=100
    )
    _, split = both(source, tmp_path)
    assert any("deinterlaced, which looks at their neighbours" in note for note in split.notes)


def test_damage(tmp_path: Path) -> None:
    """What does not decode is lost in the same places, and told once."""
    source = make(tmp_path / "in.mkv", options=X264, frames=120)
    with av.open(str(source)) as container:
        at = [p.pos for p in container.demux(container.streams.video[0]) if p.size]
    data = bytearray(source.read_bytes())
    for i in (31, 72):
        place = at[i]
        assert place is not None
        data[place + 12 : place + 30] = bytes(18)
    source.write_bytes(data)
    whole, split = both(source, tmp_path)
    damage = ("corrupt_packets", "damaged_frames", "lost_s")
    facts = whole.stage("source").facts
    assert any(facts[name] for name in damage)
    assert [split.stage("source").facts[name] for name in damage] == [facts[n] for n in damage]


def test_from_disorder_on_the_rest_is_one_part(tmp_path: Path) -> None:
    """Two files one behind the other: timestamps begin again in the middle."""
    first = make(tmp_path / "a.ts", options=X264, frames=75).read_bytes()
    source = tmp_path / "in.ts"
    source.write_bytes(first + first)
    decode = Decode(path=str(source))
    decode.plan()
    segments = list(cut(decode, 0.7))
    assert len(segments) > 1
    assert segments[-1].end is None
    whole, _ = both(source, tmp_path)
    assert whole.stage("sink").facts["frames"] == 150


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make(tmp_path / "in.mp4", options=X264, frames=100, audio=[Audio()])


@pytest.mark.usefixtures("no_leaks")
def test_a_failing_worker_stops_all_and_leaves_nothing(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = join.PartEncode.write

    def write(self: Any, frame: Frame) -> None:
        if frame.time_s > 2:
            raise OutputError("it broke")
        real(self, frame)

    monkeypatch.setattr(join.PartEncode, "write", write)
    out = tmp_path / "out" / "o.mp4"
    out.parent.mkdir()
    with pytest.raises(OutputError, match=r"stage 'sink' at 2\.\d+ s: it broke"):
        SplitRun(graph(clip, out), [CPU, CPU], least_s=0.7).run()
    assert list(out.parent.iterdir()) == []


@pytest.mark.usefixtures("no_leaks")
def test_a_failing_join_stops_all_and_leaves_nothing(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = join.JoinWriter.join

    def joined(self: Any, packets: Any, facts: Any) -> None:
        if self._frames:
            raise OutputError("no space left")
        real(self, packets, facts)

    monkeypatch.setattr(join.JoinWriter, "join", joined)
    out = tmp_path / "out" / "o.mp4"
    out.parent.mkdir()
    with pytest.raises(OutputError, match="no space left"):
        SplitRun(graph(clip, out), [CPU, CPU], least_s=0.7).run()
    assert list(out.parent.iterdir()) == []


@pytest.mark.usefixtures("no_leaks")
def test_parts_with_other_headers_are_refused(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = join.PartWriter.facts
    monkeypatch.setattr(
        join.PartWriter,
        "facts",
        lambda self: join.PartFacts(b"other", real(self).frames, 0, real(self).end_pts),
    )
    with pytest.raises(OutputError, match="parts that encoder libx264 made do not fit together"):
        SplitRun(graph(clip, tmp_path / "o.mp4"), [CPU, CPU], least_s=0.7).run()
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.usefixtures("no_leaks")
def test_abort_keeps_nothing(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SplitRun(graph(clip, tmp_path / "o.mp4"), [CPU, CPU], least_s=0.7)
    real = join.JoinWriter.join

    def joined(self: Any, packets: Any, facts: Any) -> None:
        run.abort()
        real(self, packets, facts)

    monkeypatch.setattr(join.JoinWriter, "join", joined)
    with pytest.raises(Cancelled):
        run.run()
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.usefixtures("no_leaks")
def test_stop_completes_the_parts_that_were_begun(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.mp4"
    run = SplitRun(graph(clip, out, codec="h264", crf=0.0), [CPU, CPU], least_s=0.7)
    real = ranges.Schedule.take

    def take(self: Schedule) -> Segment | None:
        segment = real(self)
        if len(self.taken) == 3:
            run.stop()
        return segment

    monkeypatch.setattr(ranges.Schedule, "take", take)
    report = run.run()
    assert report.outcome == "stopped"
    assert report.problems == []
    assert len(packets(out)) == 60
    with av.open(str(out)) as container:
        last = [p for p in container.demux(container.streams.audio[0]) if p.size][-1]
        assert float((last.pts or 0) * (last.time_base or 0)) < 2.5


def test_a_file_that_exists_is_refused_before_anything_starts(tmp_path: Path, clip: Path) -> None:
    out = tmp_path / "o.mp4"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        SplitRun(graph(clip, out), [CPU, CPU], least_s=0.7).run()
    assert out.read_bytes() == b"mine"


def test_progress_and_report_are_those_of_all_workers(tmp_path: Path, clip: Path) -> None:
    run = SplitRun(graph(clip, tmp_path / "o.mp4"), [CPU, CPU], least_s=0.7)
    run.start()
    assert run.sources()[0].expected_frames == 100
    while not run.wait(0.2):
        pass
    frames, media_s = run.written()
    assert (frames, round(media_s, 3)) == (100, 4.0)
    report = run.report()
    assert [(s.name, s.use) for s in report.stages] == [("source", "decode"), ("sink", "encode")]
    assert report.stage("sink").frames_in == report.stage("source").frames_out == 100
    assert report.stage("sink").facts["size"] == (tmp_path / "o.mp4").stat().st_size
    assert report.to_dict()["outcome"] == "complete"


def test_stages_between_run_on_every_worker(tmp_path: Path, clip: Path) -> None:
    def build(out: Path) -> Graph:
        built = Graph().add("source", "decode", path=str(clip))
        built.add("resize", "resize", "source", scale=1.5)
        return built.add("sink", "encode", "resize", path=str(out), codec="ffv1")

    Pipeline(build(tmp_path / "one.mkv")).run()
    report = SplitRun(build(tmp_path / "two.mkv"), [CPU, CPU], least_s=0.7).run()
    assert report.stage("resize").frames_in == 100
    got, expected = pictures(tmp_path / "two.mkv"), pictures(tmp_path / "one.mkv")
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))


def test_what_cannot_be_split_is_refused(tmp_path: Path, clip: Path) -> None:
    built = Graph("g").add("source", "decode", path=str(clip))
    built.add("sink", Null(), "source")
    with pytest.raises(GraphError, match=r"stage 'sink' \(Null\) cannot be split"):
        SplitRun(built, [CPU, CPU])
    built = Graph("g").add("source", "decode", path=str(clip))
    built.add("one", "null", "source").add("two", "null", "source")
    with pytest.raises(GraphError, match="1 decode stages and 2 that encode or take nothing"):
        SplitRun(built, [CPU, CPU])
    with pytest.raises(InputError, match="0 devices"):
        run_split(graph(clip, tmp_path / "o.mp4"), [])
    with pytest.raises(VidpipeError, match="does not exist"):
        run_split(graph(tmp_path / "no.mp4", tmp_path / "o.mp4"), [CPU, CPU])


def test_devices_that_encode_differently_are_refused(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["libx264", "h264_nvenc"] * 9)
    monkeypatch.setattr(join.PartEncode, "choice", property(lambda self: (next(names), None, None)))
    with pytest.raises(InputError, match=r"encode differently \(libx264, h264_nvenc\)"):
        SplitRun(graph(clip, tmp_path / "o.mp4"), [CPU, CPU], least_s=0.7).run()


def test_a_stage_set_to_the_cpu_stays_there(tmp_path: Path, clip: Path) -> None:
    built = graph(clip, tmp_path / "o.mp4", {"device": "cpu"})
    run = SplitRun(built, [Device("cuda", 0)])
    copy = run._copy(Device("cuda", 1))
    assert copy.nodes["source"].options["device"] == "cpu"
    built.set("source", "device", "cuda")
    assert run._copy(Device("cuda", 1)).nodes["source"].options["device"] == "cuda:1"


def test_workers_of_one_gpu_share_its_memory(tmp_path: Path, clip: Path) -> None:
    gpus = [Device("cuda", i) for i in (0, 1, 1)]
    run = SplitRun(graph(clip, tmp_path / "o.mp4"), gpus, vram_limit=1000)
    assert [run._options_on(gpu)["vram_limit"] for gpu in gpus] == [1000, 500, 500]
    assert SplitRun(graph(clip, tmp_path / "o.mp4"), gpus)._options_on(gpus[0]) == {}


def test_names_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: 3)))
    monkeypatch.setattr("vidpipe.segments.import_cupy", lambda _: fake)
    assert [str(d) for d in devices_of("cuda:all")] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(d) for d in devices_of("cuda:0, cuda:2")] == ["cuda:0", "cuda:2"]
    for single in ("cuda", "cuda:1", "cpu", "auto", "rtx"):
        assert devices_of(single) == []
    with pytest.raises(DeviceError, match="'cuda:0,cpu' is not a list of GPUs"):
        devices_of("cuda:0,cpu")


def test_why_the_host_encodes_is_told_once(tmp_path: Path, clip: Path) -> None:
    run = SplitRun(graph(clip, tmp_path / "o.mp4"), [CPU, CPU], least_s=0.7)
    run.plan()
    assert run._join is not None
    assert run._join.sink is not None
    run._join.sink._why_host = "h264_nvenc on cuda:0: no such chip"
    run.start()
    run.wait()
    notes = run.report().notes
    assert sum("encoded from host memory: h264_nvenc on cuda:0" in n for n in notes) == 1


def test_what_the_gpu_stops_decoding_the_cpu_goes_on_with(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No frame is lost or given twice, wherever in a part it happens."""
    real = ranges.RangeDecode._all
    failed: list[Any] = []

    def read(self: Any, *arguments: Any) -> Iterator[Frame]:
        for count, frame in enumerate(real(self, *arguments)):
            if self not in failed and count == 7:
                failed.append(self)
                raise _NotInHardware("its pictures are deinterlaced there")
            yield frame

    monkeypatch.setattr(ranges.RangeDecode, "_all", read)
    out = tmp_path / "o.mkv"
    report = SplitRun(graph(clip, out, codec="ffv1"), [CPU, CPU], least_s=0.7).run()
    assert len(failed) == 2
    assert report.problems == []
    got, expected = pictures(out), pictures(clip)
    assert len(got) == len(expected) == 100
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))


def test_a_list_of_gpus_makes_a_split_run(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def build(source: Path, out: Path, *, device: str | None, **_: Any) -> Graph:
        asked.append(device)
        return graph(source, out)

    monkeypatch.setattr("vidpipe.segments.import_cupy", lambda _: None)
    monkeypatch.setattr("vidpipe.api.build_graph", build)
    run = make_run(clip, tmp_path / "o.mp4", device="cuda:1,cuda:1")
    assert isinstance(run, SplitRun)
    assert [str(d) for d in run.devices] == ["cuda:1", "cuda:1"]
    assert isinstance(make_run(clip, tmp_path / "o.mp4", device="cuda:1"), Pipeline)
    assert asked == ["cuda:1", "cuda:1"]


def to_null(source: Path, **options: Any) -> Graph:
    built = Graph("null").add("source", "decode", path=str(source), **options)
    built.add("resize", "resize", "source", scale=0.5)
    return built.add("sink", "null", "resize")


class Watched(SplitRun):
    """Keeps what each worker's sink was given."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.given: list[list[int]] = []

    def _around(self, sink: Sink) -> Sink:
        given: list[int] = []
        self.given.append(given)
        real = sink.write

        def write(frame: Frame) -> None:
            given.append(frame.pts)
            real(frame)

        sink.write = write  # type: ignore[method-assign]
        return sink


@pytest.mark.usefixtures("no_leaks")
def test_parts_may_go_to_nothing(clip: Path) -> None:
    run = Watched(to_null(clip), [CPU, CPU], least_s=0.7)
    report = run.run()
    assert report.problems == []
    assert report.outcome == "complete"
    assert "5 parts on cpu, cpu" in report.notes
    assert [(s.name, s.use, s.frames_in) for s in report.stages] == [
        ("source", "decode", 0), ("resize", "resize", 100), ("sink", "null", 100)
    ]  # fmt: skip
    assert sorted(pts for given in run.given for pts in given) == [p for p, _ in pictures(clip)]
    for given in run.given:
        assert all(a < b for a, b in pairwise(given))
    assert report.media_s == pytest.approx(4.0)
    facts = report.stage("source").facts
    assert (facts["frames"], facts["complete"], facts["damaged"]) == (100, True, False)
    frames, media_s = run.written()
    assert (frames, round(media_s, 3)) == (100, 4.0)


@pytest.mark.usefixtures("no_leaks")
def test_a_failure_on_the_way_to_nothing_stops_all(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Null, frame: Frame) -> None:
        if frame.time_s > 2:
            raise OutputError("it broke")

    monkeypatch.setattr(Null, "write", write)
    with pytest.raises(OutputError, match=r"stage 'sink' at 2\.\d+ s: it broke"):
        SplitRun(to_null(clip), [CPU, CPU], least_s=0.7).run()


def test_a_run_stopped_while_it_is_planned_begins_no_part(clip: Path) -> None:
    run = SplitRun(to_null(clip), [CPU, CPU], least_s=0.7)
    real = run.plan

    def plan() -> None:
        real()
        run.stop()

    run.plan = plan  # type: ignore[method-assign]
    assert run.run().outcome == "stopped"
    assert run.written()[0] == 0


def test_a_run_asks_how_many_decoders_and_says_it(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Graph] = []

    def choose(graph: Graph, source: str, sink: str, head: Any, clock: Any) -> tuple[int, str]:
        assert (source, sink, head.expected_frames) == ("source", "sink", 100)
        asked.append(graph)
        return 3, "decode 1 fps, models 3 fps: 3 decoders on each GPU"

    monkeypatch.setattr(decoders, "choose", choose)
    run = SplitRun(to_null(clip), [CPU], decoders=None, least_s=0.7)
    report = run.run()
    assert len(asked) == 1
    assert run.devices == [CPU] * 3
    assert report.notes[0] == "decode 1 fps, models 3 fps: 3 decoders on each GPU"
    assert report.stage("sink").frames_in == 100
    limited = SplitRun(to_null(clip), [CPU], decoders=None, vram_limit=1 << 40)
    limited.plan()
    assert limited.devices == [CPU]
    assert len(asked) == 1


def test_all_gpus_get_as_many_decoders_as_pay(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = {"cuda:all": [Device("cuda")], "cuda:0,cuda:0": [Device("cuda")] * 2}
    monkeypatch.setattr("vidpipe.segments.devices_of", gpus.get)
    monkeypatch.setattr("vidpipe.api.build_graph", lambda source, out, **_: graph(source, out))
    made = {name: make_run(clip, tmp_path / "o.mp4", device=name) for name in gpus}
    assert [getattr(run, "_measured", None) for run in made.values()] == [False, True]
    assert [len(getattr(run, "devices", [])) for run in made.values()] == [1, 2]


def test_several_decoders_of_one_device(tmp_path: Path, clip: Path) -> None:
    report = run_split(graph(clip, tmp_path / "o.mp4"), [CPU], decoders=3)
    assert report.problems == []
    assert len(report.stage("sink").facts["streams"]) == 1
