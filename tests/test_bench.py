"""The benchmark: rigs, the clip, verification, and the command. No time is asserted."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import av
import mediagen
import numpy as np
import pytest

import vidpipe
from vidpipe import bench as benchmark
from vidpipe.bench import Options, chart, clip, rig, split
from vidpipe.bench.network import Network
from vidpipe.device import CPU, Device, Ring
from vidpipe.errors import InputError, SpecError, VerificationError
from vidpipe.frame import PIXEL_FORMATS, Frame
from vidpipe.media.decode import Decode
from vidpipe.model.descriptor import describe, find_model
from vidpipe.stage import Null
from vidpipe.testing import Identity, pattern, spec

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return mediagen.make(tmp_path / "small.mp4", frames=10, size=(96, 64))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clip, "clip_folder", lambda: tmp_path)
    return tmp_path


# -- sources -----------------------------------------------------------------------------------


def test_repeat_plays_its_frames_to_and_fro_with_times_that_rise() -> None:
    frames = [pattern(spec(), n) for n in range(4)]
    found = list(itertools.islice(rig.Repeat(frames).frames(), 12))
    order = [next(i for i, f in enumerate(frames) if f.planes is g.planes) for g in found]
    assert order == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert [f.pts for f in found] == list(range(12))


def test_one_frame_can_be_repeated() -> None:
    found = itertools.islice(rig.Repeat([pattern(spec())]).frames(), 3)
    assert [f.pts for f in found] == [0, 1, 2]


def test_loop_reads_a_file_again_and_its_time_goes_on(small: Path) -> None:
    once = [(f.pts, f.planes[0].copy()) for f in vidpipe.read(small)]
    loop = rig.Loop(Decode(path=str(small)))
    loop.plan()
    loop.open()
    found = [(f.pts, f.planes[0].copy()) for f in itertools.islice(loop.frames(), 25)]
    loop.close()
    step = once[1][0] - once[0][0]
    assert [pts for pts, _ in found] == [once[0][0] + step * n for n in range(25)]
    for number, (_, plane) in enumerate(found):
        assert np.array_equal(plane, once[number % 10][1])


# -- rigs --------------------------------------------------------------------------------------


class Counts(Identity):
    """Counts frames, from a ring as stages do."""

    def __init__(self) -> None:
        self.frames = 0
        self.depths: list[int] = []

    def open(self) -> None:
        self.depths.append(self.ring_depth)
        self.ring = Ring([(s, np.uint8) for s in spec().plane_shapes()], self.ring_depth)

    def process(self, frame: Frame) -> Iterable[Frame]:
        self.frames += 1
        slot, planes = self.ring.lease()
        for plane, source in zip(planes, frame.planes, strict=True):
            plane[...] = source
        return (frame.replace(planes, frame.spec, slot=slot),)


def test_a_rig_gives_so_many_frames_at_a_time_and_stays_open() -> None:
    stage = Counts()
    one = rig.Rig("one", rig.Repeat([pattern(spec(), n) for n in range(3)]), [stage], Null())
    bursts = [one.burst(n) for n in (3, 30, 300)]
    assert [b.frames for b in bursts] == [3, 30, 300]
    assert stage.frames == (1 + 3) + (10 + 30) + (32 + 300)  # each after a lead-in
    assert all(b.wall_s > 0 and b.processor_s > 0 for b in bursts)
    assert stage.depths == [4]
    assert stage.ring.grown == 0
    report = one.close()
    assert report.problems == []
    assert report.stage("sink").frames_in == stage.frames


def test_rigs_take_turns() -> None:
    stages = [Counts(), Counts()]
    rigs = [rig.Rig("a rig", rig.Repeat([pattern(spec())]), [s], Null()) for s in stages]
    for _ in range(2):
        for number, one in enumerate(rigs):
            before = stages[1 - number].frames
            one.burst(3)
            assert stages[1 - number].frames == before
    assert [s.frames for s in stages] == [8, 8]
    rigs[0].close()
    rig.close_all(rigs)  # also one that has ended already


def test_kept_frames_are_copies() -> None:
    stage = Counts()
    one = rig.Rig("kept", rig.Repeat([pattern(spec(), n) for n in range(5)]), [stage], Null())
    kept = one.keep(5)
    assert len(kept) == 5
    for number, frame in enumerate(kept):
        assert frame.pts == number
        for plane, expected in zip(frame.planes, pattern(spec(), number).planes, strict=True):
            assert np.array_equal(plane, expected)
    one.close()


def test_an_error_in_a_rig_reaches_the_caller() -> None:
    class Fails(Identity):
        def process(self, frame: Frame) -> Iterable[Frame]:
            raise SpecError("not today")

    one = rig.Rig("fails", rig.Repeat([pattern(spec())]), [Fails()], Null())
    with pytest.raises(SpecError, match="not today"):
        one.burst(3)


def test_an_error_while_a_rig_opens_reaches_the_caller() -> None:
    class Fails(Identity):
        def open(self) -> None:
            raise SpecError("not open")

    one = rig.Rig("fails", rig.Repeat([pattern(spec())]), [Fails()], Null())
    with pytest.raises(SpecError, match="not open"):
        one.burst(3)


def test_an_interruption_while_a_rig_opens_leaves_nothing_behind() -> None:
    opening = threading.Event()

    class Slow(Identity):
        def open(self) -> None:
            opening.wait(30)

    class Interrupted(rig.StartGate):
        def wait(self) -> None:
            if threading.current_thread() is threading.main_thread():
                opening.set()
                raise KeyboardInterrupt
            super().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig, "StartGate", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            rig.Rig("slow", rig.Repeat([pattern(spec())]), [Slow()], Null())
    for thread in threading.enumerate():
        if thread.name.startswith("vidpipe-"):
            thread.join(30)


def test_a_burst_is_of_whole_bundles() -> None:
    stage = Counts()
    one = rig.Rig("bundles", rig.Repeat([pattern(spec())]), [stage], Null())
    one._source.bundle = 4
    assert one.burst(9).frames == 12
    assert stage.frames == 4 + 12
    one.close()


def test_rigs_at_once_share_the_processor_time_that_each_has_seen() -> None:
    seen = rig.Burst(3, rig.Moment(0.0), rig.Moment(1.0), 0.4)
    group: Any = [SimpleNamespace(burst=lambda _: seen)] * 2
    assert [burst.processor_s for burst in split._at_once(group, 3)()] == [0.2, 0.2]


def test_a_burst_in_detail_knows_the_threads() -> None:
    one = rig.Rig("detail", rig.Repeat([pattern(spec())]), [Counts()], Null())
    burst = one.burst(50, detailed=True)
    assert {"vidpipe-source", "vidpipe-stage1", "vidpipe-sink"} <= set(burst.threads)
    assert burst.begin.pool == {}
    assert burst.end.waits == burst.begin.waits
    one.close()


# -- the clip ----------------------------------------------------------------------------------


def test_the_made_clip_repeats_whole_groups_with_times_that_rise(own_folder: Path) -> None:
    path = clip.synthetic_clip(96, 64, drawn=60, rounds=3)
    frames = [(f.pts, [p.copy() for p in f.planes]) for f in vidpipe.read(path)]
    assert len(frames) == 180
    steps = {b[0] - a[0] for a, b in itertools.pairwise(frames)}
    assert len(steps) == 1
    for number in (0, 1, 59):
        for other in (60 + number, 120 + number):
            for a, b in zip(frames[number][1], frames[other][1], strict=True):
                assert np.array_equal(a, b)
    assert not np.array_equal(frames[0][1][0], frames[1][1][0])
    written = path.stat().st_mtime_ns
    assert clip.synthetic_clip(96, 64, drawn=60, rounds=3) == path
    assert path.stat().st_mtime_ns == written
    assert [p.name for p in own_folder.iterdir()] == [path.name]


def test_the_made_clip_is_what_real_files_are(own_folder: Path) -> None:
    with av.open(str(clip.synthetic_clip(96, 64, drawn=60, rounds=1))) as container:
        stream = container.streams.video[0]
        keys = [n for n, f in enumerate(container.decode(stream)) if f.key_frame]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert Fraction(stream.average_rate) == 60
    assert keys == [0]


# -- verification ------------------------------------------------------------------------------


def test_psnr_is_that_of_the_definition() -> None:
    one = np.full((8, 8), 100, np.uint8)
    assert benchmark.psnr(one, one, 8) is None
    two = one.copy()
    two[0, 0] = 108  # a mean squared error of 1
    assert benchmark.psnr(one, two, 8) == pytest.approx(48.1308, abs=1e-3)
    deep = one.astype(np.uint16)
    assert benchmark.psnr(deep, two.astype(np.uint16), 10) == pytest.approx(60.1975, abs=1e-3)
    assert benchmark.psnr(one, one[:4], 8) == 0.0


@pytest.mark.parametrize(("semi", "planar"), [("nv12", "yuv420p"), ("p010le", "yuv420p10le")])
def test_components_of_semi_planar_pictures_are_those_of_planar_ones(
    semi: str, planar: str
) -> None:
    frame = pattern(spec(name=planar), 3)
    y, u, v = frame.planes
    packed = spec(name=semi)
    shift = PIXEL_FORMATS[semi].shift
    other = Frame((y << shift, np.stack([u, v], axis=-1) << shift), packed, 3)
    for a, b in zip(benchmark.components(frame), benchmark.components(other), strict=True):
        assert np.array_equal(a, b)


def _wrong(frame: Frame) -> Frame:
    planes = [plane.copy() for plane in frame.planes]
    planes[1][:] += 2
    return frame.replace(planes, frame.spec)


def _late(frame: Frame) -> Frame:
    return Frame(frame.planes, frame.spec, frame.pts + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_wrong, r"component 1 .* dB against the CPU path"), (_late, "a frame is at")],
)
def test_no_speed_is_given_of_a_wrong_output(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Frame], Frame],
    message: str,
) -> None:
    reference = benchmark.Chain._reference

    def changed(self: Any, count: int) -> Iterator[Frame]:
        return map(change, reference(self, count))

    def timed(*_: object) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(benchmark.Chain, "_reference", changed)
    monkeypatch.setattr(benchmark.Chain, "_turns", timed)
    with pytest.raises(VerificationError, match=message) as caught:
        benchmark.bench(Options(chains=(("nano-2x",),), source=small, frames=3))
    assert caught.value.exit_code == 4


def test_missing_frames_are_no_equal_output() -> None:
    with pytest.raises(VerificationError, match="1 frames came, expected 2"):
        benchmark.same_times([Fraction(0)], [Fraction(0), Fraction(1)], "it")


# -- the whole ---------------------------------------------------------------------------------


def test_the_network_alone_gives_what_its_file_gives() -> None:
    ort = pytest.importorskip("onnxruntime")
    model = describe(find_model("clean-1x-nano"))
    network = Network(model, 48, 32, CPU)
    assert not network.graph
    assert network.burst(3).frames == 3
    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    picture, result, strength = network._buffers
    feeds = {model.input: picture.astype(np.float32), model.strength: strength}
    (expected,) = session.run([model.output], feeds)
    assert result.shape == expected.shape
    assert np.allclose(result, expected, atol=2e-3)
    network.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 2}, "no median"),
        ({"frames": 1}, "cannot be timed"),
        ({"chains": ()}, "no model"),
        ({"size": (31, 64)}, "cannot be made"),
    ],
)
def test_options_that_measure_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**{"chains": (("nano-2x",),), **changes})


def test_the_command_measures_two_models_in_a_row(small: Path, tmp_path: Path) -> None:
    plot, profile = tmp_path / "bars.svg", tmp_path / "trace.json"
    command = ["bench", small, "--model", "clean-1x-nano+nano-2x", "--frames", 3, "--json"]
    done = _vidpipe(*command, "--steady", 6, "--plot", plot, "--profile", profile)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["machine"]["versions"]["av"]
    assert result["repeats"] == 3
    assert result["profiled"]
    (chain,) = result["chains"]
    assert chain["models"] == ["clean-1x-nano", "nano-2x"]
    assert chain["output"] == {"width": 192, "height": 128, "format": "yuv420p"}
    assert chain["verified"]["identical"]
    assert chain["problems"] == []
    figures = {figure["name"]: figure for figure in chain["figures"]}
    models = ["model clean-1x-nano", "model nano-2x"]
    assert list(figures) == [
        *("decode", *models, "encode", "network clean-1x-nano", "network nano-2x"),
        *("pipeline to null", "pipeline to a file"),
    ]
    for figure in figures.values():
        assert len(figure["runs_fps"]) == 3
        assert sorted(figure["runs_fps"])[1] == figure["fps"]
        assert figure["frames"] == 3
    whole = figures["pipeline to a file"]
    lowest = min(("decode", *models, "encode"), key=lambda name: figures[name]["fps"])
    assert whole["lowest_stage"] == lowest
    assert whole["share_of_lowest"] == pytest.approx(
        whole["fps"] / figures[lowest]["fps"], rel=1e-3
    )
    assert whole["sum_of"] == ["decode", *models, "encode"]
    together = 1 / sum(1 / figures[name]["fps"] for name in whole["sum_of"])
    assert whole["sum_fps"] == pytest.approx(together, rel=1e-3)
    assert chain["steady"]["frames"] == 6
    assert chain["steady"]["host_waits_a_frame"] == {}
    bars = ElementTree.parse(plot).getroot()
    text = " ".join(t.text or "" for t in bars.iter("{http://www.w3.org/2000/svg}text"))
    assert all(name in text for name in figures)
    titles = {run["graph"] for run in json.loads(profile.read_text())["otherData"]["runs"]}
    assert {title.partition(": ")[2] for title in titles} >= {"decode", "pipeline to a file"}


def test_a_model_may_stand_in_a_chain_twice(small: Path) -> None:
    options = Options(
        chains=(("clean-1x-nano", "clean-1x-nano"),), source=small, frames=3, ends=("null",)
    )
    (chain,) = benchmark.bench(options)["chains"]
    names = [figure["name"] for figure in chain["figures"]]
    assert names[1:3] == ["model clean-1x-nano", "model clean-1x-nano (2)"]
    assert chain["figures"][-1]["sum_of"] == names[:3]


def test_the_table_is_short(small: Path) -> None:
    done = _vidpipe("bench", small, "--frames", 3, "--to", "null")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 12
    names = ("decode", "model nano-2x")
    rates = {
        n: float(line.split(n)[1].split()[0]) for line in lines for n in names if f" {n}  " in line
    }
    (whole,) = [line for line in lines if "pipeline to null" in line]
    assert f" of {min(names, key=rates.__getitem__)}" in whole
    assert not any("file" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "none-2x"], 2, "none-2x"),
        (["--size", "100"], 2, "WIDTHxHEIGHT"),
        (["--device", "gpu"], 3, "cuda"),
        (["--plot", "bars.jpg"], 2, ".svg"),
        (["--profile", "nowhere/trace.json"], 2, "nowhere"),
        (["none.mp4"], 2, "none.mp4"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = _vidpipe("bench", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert message in lines[0]


def _vidpipe(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = str(Path(vidpipe.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "vidpipe", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": path},
    )


# -- split over several workers ----------------------------------------------------------------


@pytest.fixture
def cuttable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clip of 160 frames with a key frame every 16, where parts may be that short."""
    monkeypatch.setattr("vidpipe.media.ranges.SHORTEST_S", 0.5)
    monkeypatch.setattr("vidpipe.media.ranges.LONGEST_S", 0.6)
    options = {"preset": "ultrafast", "g": "16", "keyint_min": "16", "sc_threshold": "0"}
    return mediagen.make(tmp_path / "long.mp4", frames=160, size=(96, 64), options=options)


def test_only_what_all_workers_do_at_once_is_timed() -> None:
    one = [(float(t), t / 2) for t in range(100)]
    two = [(t + 0.5, 0.0) for t in range(10, 60)]
    burst = split.together([one, two])
    # The first has its lead-in, a quarter of its frames, behind it at 25; the second ends at 59.5.
    assert (burst.begin.time_s, burst.end.time_s) == (25.0, 59.5)
    assert burst.frames == 34 + 35
    assert burst.fps == pytest.approx(2.0)
    assert split.whole_fps([one, two]) == pytest.approx(149 / 99)


@pytest.mark.parametrize(
    "watches",
    [
        [[(0.0, 0.0), (1.0, 0.0)], []],
        [[], []],
        [[(0.0, 0.0), (1.0, 0.0)], [(2.0, 0.0), (3.0, 0.0)]],
        [[(0.0, 0.0)], [(0.0, 0.0)]],
    ],
)
def test_workers_that_are_not_at_work_at_once_have_no_rate(
    watches: list[list[tuple[float, float]]],
) -> None:
    with pytest.raises(InputError, match="too short to keep 2 workers at work at once"):
        split.together(watches)


def test_a_split_pipeline_is_measured_against_as_many_decoders(cuttable: Path) -> None:
    options = Options(
        chains=(("clean-1x-nano", "nano-2x"),),
        source=cuttable,
        devices=(CPU, CPU),
        seconds=0.01,
    )
    result = benchmark.bench(options)
    assert result["device"] == "cpu,cpu"
    (chain,) = result["chains"]
    assert chain["workers"] == ["cpu", "cpu"]
    assert chain["problems"] == []
    assert chain["steady"] is None
    assert chain["verified"]["identical"]
    assert chain["verified"]["frames"] == 4
    assert chain["verified"]["times_compared"] == 64
    assert chain["output"] == {"width": 192, "height": 128, "format": "yuv420p"}
    figures = {figure["name"]: figure for figure in chain["figures"]}
    models = ["model clean-1x-nano", "model nano-2x"]
    assert list(figures) == [
        *("decode", *models, "encode", "pipeline to null", "pipeline to a file")
    ]
    for name in ("decode", "pipeline to null", "pipeline to a file"):
        assert figures[name]["whole_fps"] > 0
        assert 0 < figures[name]["frames"] < 160
    for figure in figures.values():
        assert len(figure["runs_fps"]) == 3
    whole = figures["pipeline to a file"]
    assert whole["sum_of"] == ["decode", *models, "encode"]
    lowest = min(whole["sum_of"], key=lambda name: figures[name]["fps"])
    assert whole["lowest_stage"] == lowest
    share = whole["fps"] / figures[lowest]["fps"]
    assert whole["share_of_lowest"] == pytest.approx(share, rel=1e-3)
    assert any(note.endswith("parts on cpu, cpu") for note in chain["notes"])


def test_what_is_asked_for_bounds_the_parts(cuttable: Path) -> None:
    options = Options(chains=(("nano-2x",),), source=cuttable, devices=(CPU, CPU))
    chain = split.SplitChain(options, [CPU, CPU], cuttable, ("nano-2x",), print, None)
    chain._find_parts()
    assert chain._starts == pytest.approx([0.64 * n for n in range(10)])
    assert chain._rate() == pytest.approx(25)
    assert chain._excerpt(0.1, 2) == {"duration_s": pytest.approx(2.56)}
    assert chain._excerpt(3.5, 2) == {"duration_s": pytest.approx(3.84)}
    assert chain._excerpt(9.0, 2) == {}
    assert chain._excerpt(0.0, 6) == {}


def test_no_speed_is_given_of_a_wrong_split(
    cuttable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(*_: object) -> None:
        raise AssertionError("something was timed")

    real = split.SplitChain._expected
    monkeypatch.setattr(split.SplitChain, "_split_turns", turns)
    options = Options(chains=(("nano-2x",),), source=cuttable, devices=(CPU, CPU))
    changes: list[tuple[Callable[[Frame], Frame], str]] = [
        (_wrong, r"component 1 .* dB against the CPU path"),
    ]
    for change, message in changes:

        def changed(
            self: Any, *others: Any, change: Callable[[Frame], Frame] = change
        ) -> Iterator[Frame]:
            return map(change, real(self, *others))

        monkeypatch.setattr(split.SplitChain, "_expected", changed)
        with pytest.raises(VerificationError, match=message):
            benchmark.bench(options)

    def lost(self: Any, excerpt: Any, wanted: Any, times: list[Fraction]) -> Iterator[Frame]:
        yield from real(self, excerpt, wanted, times)
        times.append(times[-1] + 1)

    monkeypatch.setattr(split.SplitChain, "_expected", lost)
    with pytest.raises(VerificationError, match="64 frames came, expected 65"):
        benchmark.bench(options)


def test_a_file_that_is_not_split_is_not_measured_as_one(small: Path) -> None:
    options = Options(chains=(("nano-2x",),), source=small, devices=(CPU, CPU))
    with pytest.raises(InputError, match="was not split: it has no key frames") as caught:
        benchmark.bench(options)
    assert "one device" in str(caught.value.hint)


def test_where_one_decoder_is_what_pays_one_pipeline_is_measured(small: Path) -> None:
    options = Options(
        chains=(("nano-2x",),),
        source=small,
        devices=(CPU,),
        decoders=None,
        frames=3,
        ends=("null",),
    )
    (chain,) = benchmark.bench(options)["chains"]
    assert chain["workers"] == ["cpu"]
    assert "network nano-2x" in [figure["name"] for figure in chain["figures"]]


def test_the_steady_state_is_that_of_one_pipeline() -> None:
    with pytest.raises(InputError, match="not over several devices"):
        Options(chains=(("nano-2x",),), devices=(CPU, CPU), steady=10)


# -- the chart ---------------------------------------------------------------------------------


def _result() -> dict[str, Any]:
    figures = [
        {"name": "decode", "kind": "stage", "fps": 700.0},
        {"name": "model a&b", "kind": "stage", "fps": 600.0},
        {
            "name": "pipeline to null", "kind": "pipeline", "fps": 590.0, "lowest_fps": 600.0,
            "share_of_lowest": 0.983, "share_of_bound": 0.983,
        },
    ]  # fmt: skip
    size = {"width": 64, "height": 48, "format": "nv12"}
    chain = {"models": ["a&b"], "input": size, "output": size, "figures": figures}
    return {"machine": {"processor": "A <fast> one"}, "chains": [chain]}


def test_bars_are_as_long_as_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "bars.svg"
    chart.draw(_result(), path)
    boxes = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}rect")
    lengths = [int(b.get("width", "")) for b in boxes if b.get("height") == "18"]
    assert lengths[1] / lengths[0] == pytest.approx(600 / 700, abs=0.01)
    assert lengths[2] / lengths[0] == pytest.approx(590 / 700, abs=0.01)


def test_a_png_has_the_same_bars(tmp_path: Path) -> None:
    path = tmp_path / "bars.png"
    chart.draw(_result(), path)
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    lengths = []
    for name in ("stage", "pipeline"):
        bar = (picture == chart._rgb(chart._COLORS[name])).all(axis=2)
        lengths += sorted({int(n) for n in bar.sum(axis=1)} - {0}, reverse=True)
    assert len(lengths) >= 3
    assert lengths[-1] / lengths[0] == pytest.approx(590 / 700, abs=0.02)


def test_letters_are_told_apart() -> None:
    drawn = {letter: chart._letters(letter).tobytes() for letter in chart._FONT}
    assert len(set(drawn.values())) == len(drawn)
    one = chart._letters("L")[:: chart._DOT, :: chart._DOT]
    assert one.tolist() == [*[[True] + [False] * 5] * 6, [True] * 5 + [False]]
    assert np.array_equal(chart._letters("l"), chart._letters("L"))


@pytest.mark.cuda
def test_the_benchmark_on_a_gpu(own_folder: Path) -> None:
    source = clip.synthetic_clip(320, 192, drawn=60, rounds=2)
    options = Options(
        chains=(("fast-2x",), ("clean-1x-fast", "fast-2x")),
        source=source,
        device=Device("cuda"),
        frames=20,
        steady=200,
    )
    for chain in benchmark.bench(options)["chains"]:
        figures = {figure["name"]: figure for figure in chain["figures"]}
        assert chain["problems"] == []
        assert chain["verified"]["identical"] or chain["verified"]["psnr_db"] > 50
        assert {"copy to the host", "pipeline to the host", "network fast-2x"} <= set(figures)
        steady = chain["steady"]
        assert steady["pool_flat"], steady["pool_growth"]
        assert set(steady["host_waits_a_frame"]) <= {"sink"}


@pytest.mark.cuda
def test_the_benchmark_of_two_decoders_on_a_gpu(own_folder: Path) -> None:
    source = clip.synthetic_clip(640, 384, drawn=120, rounds=15)
    gpu = Device("cuda")
    options = Options(
        chains=(("fast-2x",),), source=source, device=gpu, devices=(gpu, gpu), seconds=0.2
    )
    (chain,) = benchmark.bench(options)["chains"]
    assert chain["problems"] == []
    assert chain["workers"] == ["cuda:0", "cuda:0"]
    assert chain["verified"]["identical"] or chain["verified"]["psnr_db"] > 50
    assert chain["verified"]["times_compared"] >= 480
    figures = {figure["name"]: figure for figure in chain["figures"]}
    assert figures["decode"]["on"] == "NVDEC of cuda:0"
    ends = ["pipeline to null", "pipeline to the host", "pipeline to a file"]
    assert list(figures)[-3:] == ends
    for end in ends:
        assert figures[end]["fps"] > 0
        assert figures[end]["lowest_stage"] in figures


@pytest.mark.cuda
def test_the_command_measures_a_list_of_gpus(own_folder: Path) -> None:
    source = clip.synthetic_clip(640, 384, drawn=120, rounds=15)
    done = _vidpipe(
        *("bench", source, "--device", "cuda:0,cuda:0", "--model", "nano-2x"),
        *("--to", "null", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == "cuda:0,cuda:0"
    assert result["chains"][0]["workers"] == ["cuda:0", "cuda:0"]
