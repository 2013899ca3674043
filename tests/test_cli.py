"""The command line, as a user runs it: real processes on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import modelgen
import numpy as np
import pytest

from vidpipe import cli, testing
from vidpipe.errors import Cancelled
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph
from vidpipe.pipeline import Pipeline
from vidpipe.stage import Source

VIDPIPE = [sys.executable, "-m", "vidpipe"]


def vidpipe(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VIDPIPE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "200"},
        **options,  # type: ignore[call-overload]
    )


def refused(*arguments: object, code: int = 2) -> str:
    """Run, expect a refusal of one line, and return it."""
    done = vidpipe(*arguments)
    assert done.returncode == code, done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[0].startswith("vidpipe: error: ")
    return lines[0]


def only(folder: Path, *names: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


@pytest.fixture(scope="module")
def doubled(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("doubled") / "out.mp4"
    done = vidpipe("run", sample, path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_the_main_job(doubled: tuple[Path, str], sample: Path) -> None:
    path, printed = doubled
    only(path.parent, "out.mp4")
    with av.open(str(path)) as out, av.open(str(sample)) as source:
        assert [s.type for s in out.streams] == ["video", "audio"]
        video = out.streams.video[0]
        assert (video.width, video.height) == (1280, 720)
        times = [f.time for f in out.decode(video)]
        assert times == [f.time for f in source.decode(video=0)]
    assert "75 frames" in printed
    assert "(slowest)" in printed


def test_the_picture_is_the_same_scene_and_sharper_than_lanczos(
    doubled: tuple[Path, str], sample: Path
) -> None:
    def luma(path: Path, width: int, height: int) -> np.ndarray:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index == 40:
                    gray = frame.reformat(width, height, "yuv420p", interpolation="LANCZOS")
                    return gray.to_ndarray()[:height].astype(float)
        raise AssertionError

    large = luma(doubled[0], 1280, 720)
    lanczos = luma(sample, 1280, 720)
    assert abs(large - lanczos).mean() < 4
    detail = [abs(np.diff(p, axis=1)).mean() for p in (large, lanczos)]
    assert detail[0] > 1.02 * detail[1]


def test_json_gives_an_object_a_line_and_a_report(sample: Path, tmp_path: Path) -> None:
    done = vidpipe("run", sample, tmp_path / "o.mkv", "--duration", 1, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {e["event"] for e in events} <= {"progress", "report"}
    report = events[-1]
    assert report["event"] == "report"
    assert report["outcome"] == "complete"
    assert report["problems"] == []
    assert [s["name"] for s in report["stages"]] == ["source", "model", "sink"]
    assert report["stages"][2]["frames_in"] == 25
    assert report["media_s"] == pytest.approx(1.0)


def test_start_and_duration_cut_exactly(sample: Path, tmp_path: Path) -> None:
    done = vidpipe("run", sample, tmp_path / "o.mkv", "--start", 1, "--duration", 0.4)
    assert done.returncode == 0, done.stderr
    with av.open(str(tmp_path / "o.mkv")) as out:
        assert len(list(out.decode(video=0))) == 10


def test_several_inputs_and_a_folder(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(sample.read_bytes())
    (tmp_path / "b.mov").write_bytes(sample.read_bytes())
    (tmp_path / "c.mp4").write_bytes(b"")
    folder = tmp_path / "out"
    folder.mkdir()
    inputs = [tmp_path / name for name in ("a.mp4", "c.mp4", "b.mov")]
    done = vidpipe("run", *inputs, folder, "--duration", 0.2)
    only(folder, "a.mp4", "b.mov")
    assert done.returncode == 2
    assert done.stderr.count("vidpipe: error: ") == 1
    assert "not a folder" in refused("run", *inputs, tmp_path / "none")


def test_a_graph_with_two_sinks(sample: Path, tmp_path: Path) -> None:
    done = vidpipe(
        "run", sample, tmp_path / "share.mp4", "--graph", "archive-and-share",
        "--set", f"master.path={tmp_path / 'master.mkv'}", "--duration", 0.4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, codec in (("share.mp4", "h264"), ("master.mkv", "ffv1")):
        with av.open(str(tmp_path / name)) as out:
            assert out.streams.video[0].codec_context.name.startswith(codec)
            assert len(list(out.decode(video=0))) == 10


def test_two_models_in_a_row(sample: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.mkv"
    assert vidpipe("run", sample, small, "--duration", 0.2, "--scale", 1.5).returncode == 0
    with av.open(str(small)) as out:
        video = out.streams.video[0]
        assert (video.width, video.height) == (960, 540)
    done = vidpipe("run", sample, tmp_path / "o.mkv", "--duration", 0.1, "--scale", 4, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [s["use"] for s in report["stages"]] == ["decode", "model", "model", "encode"]
    with av.open(str(tmp_path / "o.mkv")) as out:
        assert out.streams.video[0].width == 2560


def test_one_interrupt_leaves_a_playable_file(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"
    process = subprocess.Popen(
        [*VIDPIPE, "run", str(sample), str(path), "--json", "--scale", "4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("frames", 0) >= 2:
            break
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "finishing what was begun" in errors
    report = json.loads(printed.splitlines()[-1])
    assert report["outcome"] == "stopped"
    with av.open(str(path)) as out:
        frames = len(list(out.decode(video=0)))
    assert 2 <= frames < 75
    assert frames == report["stages"][-1]["frames_in"]
    only(tmp_path, "o.mp4")


@pytest.mark.skipif(os.name != "posix", reason="sends itself a POSIX signal")
def test_an_interrupt_before_the_first_frame_keeps_nothing(tmp_path: Path) -> None:
    class Interrupted(Source):
        stopped = threading.Event()

        def plan(self) -> FrameSpec:
            return testing.spec()

        def frames(self) -> Iterator[Frame]:
            os.kill(os.getpid(), signal.SIGINT)
            assert self.stopped.wait(60)
            return iter(())

        def stop(self) -> None:
            self.stopped.set()

    graph = Graph().add("in", Interrupted())
    graph.add("out", "encode", "in", path=str(tmp_path / "o.mp4"))
    with pytest.raises(Cancelled, match="nothing was kept") as caught:
        cli._run(Pipeline(graph), Path("camera"), as_json=True)
    assert caught.value.exit_code == 130
    only(tmp_path)


def test_two_interrupts_leave_nothing(sample: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*VIDPIPE, "run", str(sample), str(tmp_path / "o.mp4"), "--json", "--scale", "4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("frames", 0) >= 1:
            break
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "finishing" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    only(tmp_path)


def test_bad_inputs_are_refused_in_one_line(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.mp4"
    text, empty = tmp_path / "t.mp4", tmp_path / "e.mp4"
    text.write_text("not a video, just text\n" * 100)
    empty.write_bytes(b"")
    assert "none.mp4" in refused("run", tmp_path / "none.mp4", out)
    refused("run", text, out)
    assert "empty" in refused("run", empty, out)
    refused("run", tmp_path, out)
    refused("run", sample, sample, "--overwrite")
    refused("run", sample, tmp_path / "no" / "folder.mp4")
    refused("run", sample, out, "--codec", "h265x")
    refused("run", sample, tmp_path / "o.webm", "--codec", "h264")
    refused("run", sample, tmp_path / "o.xyz")
    refused("run", sample, out, "--model", text)
    assert "Did you mean 'nano-2x'" in refused("run", sample, out, "--model", "nano2x")
    assert "cuda" in refused("run", sample, out, "--device", "cuda", code=3)
    assert "stage.key=value" in refused("run", sample, out, "--set", "model")
    assert "Did you mean 'model'" in refused("run", sample, out, "--set", "modle.tile=off")
    assert "no option 'tiles'" in refused("run", sample, out, "--set", "model.tiles=off")
    assert "no graph is called" in refused("run", sample, out, "--graph", "nothing")
    assert "expected 1 to 16" in refused("run", sample, out, "--scale", 0.5)
    assert "expected 0 to 1" in refused("run", sample, out, "--denoise", 2)
    refused("run", sample)
    only(tmp_path, "t.mp4", "e.mp4")


def test_a_truncated_file_gives_what_decodes_and_says_what_is_lost(
    sample: Path, tmp_path: Path
) -> None:
    whole = sample.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(0.6 * len(whole))])
    done = vidpipe("run", tmp_path / "cut.mp4", tmp_path / "o.mp4")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [n for n in done.stderr.splitlines() if "damaged" in n]
    assert "s of the picture lost; kept what decodes" in line
    with av.open(str(tmp_path / "o.mp4")) as out:
        assert 20 < len(list(out.decode(video=0))) < 75


def test_damage_in_the_middle_is_skipped(sample: Path, tmp_path: Path) -> None:
    data = bytearray(sample.read_bytes())
    middle = len(data) // 2
    for offset in range(middle, middle + 3000):
        data[offset] ^= 0x5A
    (tmp_path / "bad.mp4").write_bytes(data)
    done = vidpipe("run", tmp_path / "bad.mp4", tmp_path / "o.mp4")
    assert done.returncode == 2, done.stderr
    assert "damaged" in done.stderr
    with av.open(str(tmp_path / "o.mp4")) as out:
        assert len(list(out.decode(video=0))) > 60


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "video" in refused("run", tmp_path / "a.m4a", tmp_path / "o.mp4")
    only(tmp_path, "a.m4a")


def test_a_model_with_wrong_channels_is_refused(sample: Path, tmp_path: Path) -> None:
    model = modelgen.Net(4).conv(np.ones((4, 4, 3, 3))).save(tmp_path / "four.onnx")
    assert "channels" in refused("run", sample, tmp_path / "o.mp4", "--model", model)
    only(tmp_path, "four.onnx")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX resource limits")
def test_a_full_disk_leaves_nothing_under_the_final_name(sample: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
        "from vidpipe.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(sample), str(tmp_path / "o.mp4")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("vidpipe: error: ") == 1
    assert "Traceback" not in done.stderr
    only(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs the peak memory of a POSIX process")
def test_memory_does_not_grow_with_length(sample: Path, tmp_path: Path) -> None:
    """Thirty times as many frames take hardly more memory."""
    from benchmarks import memory

    figures = memory.measure(sample, "nano-2x", rounds=1)
    assert figures["long_frames"] == 30 * figures["short_frames"]
    assert figures["long_peak_mb"] - figures["short_peak_mb"] < 25


def test_an_existing_output_is_kept_unless_told(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"
    path.write_text("precious")
    assert "--overwrite" in refused("run", sample, path)
    assert path.read_text() == "precious"
    done = vidpipe("run", sample, path, "--overwrite", "--duration", 0.2)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 1000


def test_usage_errors_exit_with_2() -> None:
    for arguments in (["run", "--nothing"], ["nothing"], ["run", "a", "b", "--quality", "x"]):
        done = vidpipe(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_lists(sample: Path) -> None:
    assert "upscale-2x" in vidpipe("graphs").stdout
    assert "nano-2x" in vidpipe("models").stdout
    assert "640x360" in vidpipe("probe", sample).stdout
    found = json.loads(vidpipe("probe", sample, "--json").stdout)
    assert found["video"]["width"] == 640
    assert "CPUExecutionProvider" in vidpipe("devices").stdout
    checked = json.loads(vidpipe("models", "--check", "nano-2x", "--json").stdout)
    assert [m["scale"] for m in checked["models"]] == [2]
    assert "not an ONNX" in refused("models", "--check", sample)
    assert json.loads(vidpipe("devices", "--json").stdout)["devices"][0]["device"] == "cpu"
    assert "nano-2x" in [
        m["name"] for m in json.loads(vidpipe("models", "--json").stdout)["models"]
    ]


def test_compare_prints_a_table_and_draws_a_sheet(
    doubled: tuple[Path, str], sample: Path, tmp_path: Path
) -> None:
    blurred, sheet = tmp_path / "blurred.mkv", tmp_path / "sheet.png"
    done = vidpipe("run", doubled[0], blurred, "--crf", 45, "--duration", 0.2, "--scale", 1,
                   "--model", "clean-1x-nano")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = vidpipe("compare", doubled[0], doubled[0], blurred, "--json", "--sheet", sheet)
    assert done.returncode == 0, done.stderr
    same, worse = json.loads(done.stdout)["scores"]
    assert same["psnr_db"] == 100
    assert same["flicker"] == 0
    assert 20 < worse["psnr_db"] < 45
    with av.open(str(sheet)) as picture:
        assert next(picture.decode(video=0)).width > 200
    printed = vidpipe("compare", doubled[0], blurred, "--frames", 2).stdout
    assert "PSNR-Y" in printed
    assert "blurred.mkv" in printed
    assert "size" in refused("compare", doubled[0], sample)
    refused("compare", doubled[0])


def test_progress_on_a_terminal_names_the_slowest_stage(sample: Path, tmp_path: Path) -> None:
    """Under a real pseudo-terminal, the way a user sees it."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*VIDPIPE, "run", str(sample), str(tmp_path / "o.mp4")],
        stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert process.wait(60) == 0
    text = seen.decode(errors="replace")
    assert "slowest: model" in text
    assert "/75 frames" in text
    assert "fps" in text


def test_precision_is_an_option_of_the_run(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.mkv"
    line = ("run", sample, out, "--duration", "0.2", "--device", "cpu", "--model", "nano-2x")
    done = vidpipe(*line, "--precision", "int8", "--wait-compile", "--offline", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    (facts,) = [stage["facts"] for stage in report["stages"] if stage["use"] == "model"]
    assert (facts["precision"], facts["swap"]) == ("int8", None)
    out.unlink()
    assert "TensorRT for RTX only" in refused(*line, "--precision", "fp8")
    assert "float16 models in float32" in refused(*line, "--precision", "fp16")
