"""What cannot be written is refused in one line, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import mediagen
import pytest
from mediagen import Audio, copy

from vidpipe.errors import InputError, MediaError, OutputError, SpecError, VidpipeError
from vidpipe.frame import PIXEL_FORMATS, Color, Frame, FrameSpec
from vidpipe.media.decode import Decode
from vidpipe.media.encode import Encode
from vidpipe.media.hdr import hdr_options
from vidpipe.media.probe import ContentLight
from vidpipe.media.writer import output_error
from vidpipe.stage import FrameSource


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return mediagen.make(folder / "in.mp4", frames=10, audio=[Audio()])


def refused(
    path: Path,
    *words: str,
    source: Path | None = None,
    spec: FrameSpec | None = None,
    **options: Any,
) -> str:
    """Plan an output that must be refused; return the line that says why."""
    spec = spec or spec_of("yuv420p")
    sink = Encode(path=str(path), **options)
    before = set(path.parent.iterdir()) if path.parent.is_dir() else set()
    if source is not None:
        decode = Decode(path=str(source))
        spec = decode.plan()
        sink.attach(decode)
    with pytest.raises(VidpipeError) as caught:
        sink.plan(spec)
    sink.close()
    error = caught.value
    assert isinstance(error, (OutputError, SpecError))
    assert error.exit_code == 2
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    assert (set(path.parent.iterdir()) if path.parent.is_dir() else set()) == before
    return text


def spec_of(format: str, size: tuple[int, int] = (64, 48), **changes: Any) -> FrameSpec:
    values: dict[str, Any] = {"time_base": Fraction(1, 25), "rate": Fraction(25)}
    values.update(changes)
    return FrameSpec(width=size[0], height=size[1], format=PIXEL_FORMATS[format], **values)


def frames(spec: FrameSpec, count: int) -> Iterator[Frame]:
    for i in range(count):
        yield Frame(mediagen.pattern(spec.format, spec.width, spec.height, i), spec, i, 1)


def test_names_that_cannot_be_written(tmp_path: Path, source: Path) -> None:
    refused(tmp_path / "out.xyz", "suffix '.xyz'", ".mkv")
    refused(tmp_path / "out", "no suffix")
    refused(tmp_path / "none" / "out.mp4", "none' does not exist")
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    refused(folder, "is a directory")
    there = tmp_path / "there.mp4"
    there.write_bytes(b"precious")
    refused(there, "exists already", "--overwrite")
    assert there.read_bytes() == b"precious"


def test_output_must_not_be_the_input(tmp_path: Path, source: Path) -> None:
    before = source.read_bytes()
    symbolic, hard = tmp_path / "symbolic.mp4", tmp_path / "hard.mp4"
    symbolic.symlink_to(source)
    os.link(source, hard)
    for path in (source, symbolic, hard, source.parent / ".." / "in" / "in.mp4"):
        refused(path, "same file as the input", source=source, overwrite=True)
    assert source.read_bytes() == before


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(tmp_path / "out.mp4", "no permission")


def test_input_without_permission(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(MediaError, match="permission denied"):
        Decode(path=str(source)).plan()


def test_codecs_that_cannot_be_used(tmp_path: Path) -> None:
    refused(tmp_path / "out.mp4", "no video encoder is called 'h265'", codec="h265")
    refused(tmp_path / "out.mp4", "encodes audio", codec="aac")
    refused(tmp_path / "out.webm", "WebM cannot hold", "libx264", ".mkv", codec="h264")
    refused(tmp_path / "out.mp4", "MP4 cannot hold", codec="huffyuv", pix_fmt="yuv422p")
    refused(tmp_path / "out.ts", "MPEG-TS cannot hold", codec="ffv1")


def test_options_that_an_encoder_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    refused(path, "ffv1 has no crf", codec="ffv1", crf=20)
    refused(path, "prores_ks has no preset", codec="prores", preset="fast")
    refused(path, "no option 'tuen'", "tune", encoder_options={"tuen": "film"})
    refused(path, "libx264 cannot be started", preset="warp")
    refused(path, "does not take pixel format 'rgb24'", "yuv420p", pix_fmt="rgb24")


def test_formats_and_sizes_that_would_lose_something(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    refused(path, "cannot hold pixel format yuv420p12le", "--pix-fmt", spec=spec_of("yuv420p12le"))
    refused(path, "libsvtav1", "yuv444p", spec=spec_of("yuv444p"), codec="av1")
    refused(path, "libvpx-vp9", "yuv420p10le", spec=spec_of("yuv420p10le"), codec="vp9")
    for codec in ("h264", "hevc"):
        refused(
            path, "even sizes", "65x47", "yuv444p", spec=spec_of("yuv420p", (65, 47)), codec=codec
        )
        sink = Encode(path=str(tmp_path / f"{codec}.mkv"), codec=codec, pix_fmt="yuv444p")
        spec = spec_of("yuv420p", (65, 47))
        copy(FrameSource(spec, frames(spec, 3)), sink)
        with av.open(str(tmp_path / f"{codec}.mkv")) as container:
            assert (container.streams.video[0].width, container.streams.video[0].height) == (65, 47)


def test_odd_sizes_where_the_encoder_can(tmp_path: Path) -> None:
    spec = spec_of("yuv420p", (65, 47))
    for codec, suffix in (("av1", "mp4"), ("vp9", "webm"), ("ffv1", "mkv"), ("mpeg4", "mp4")):
        path = tmp_path / f"{codec}.{suffix}"
        copy(FrameSource(spec, frames(spec, 3)), Encode(path=str(path), codec=codec))
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert (frame.width, frame.height) == (65, 47)


def test_rotation_and_hdr_that_a_container_cannot_hold(tmp_path: Path) -> None:
    turned = mediagen.make(tmp_path / "turned.mp4", frames=3, rotation=90)
    refused(tmp_path / "out.ts", "rotation", "--drop rotation", source=turned)
    copy(Decode(path=str(turned)), Encode(path=str(tmp_path / "out.ts"), drop=["rotation"]))
    bright = mediagen.make(
        tmp_path / "hdr.mkv",
        frames=3,
        pix_fmt="yuv420p10le",
        color=Color(9, 16, 9, 1, 0),
        options=hdr_options("libx264", {}, None, ContentLight(1000, 400)),
    )
    refused(
        tmp_path / "mpeg.ts",
        "HDR10",
        "--drop hdr",
        source=bright,
        codec="mpeg2",
        pix_fmt="yuv420p",
    )


def test_transparency_is_refused_at_the_entrance(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mkv", codec="ffv1", pix_fmt="yuva420p", frames=2)
    with pytest.raises(InputError, match="--drop alpha"):
        Decode(path=str(path)).plan()


def test_no_frames_no_file(tmp_path: Path) -> None:
    sink = Encode(path=str(tmp_path / "out.mp4"))
    with pytest.raises(OutputError, match="no frame came"):
        copy(FrameSource(spec_of("yuv420p"), []), sink)
    assert list(tmp_path.iterdir()) == []


def test_broken_run_leaves_nothing(tmp_path: Path, source: Path, no_leaks: None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    decode, sink = Decode(path=str(source)), Encode(path=str(out / "out.mkv"))
    spec = decode.plan()
    sink.attach(decode)
    sink.plan(spec)
    sink.open()
    for frame in decode.frames():
        sink.write(frame)
        assert [p.name[0] for p in out.iterdir()] == ["."]
    sink.close()
    decode.close()
    assert list(out.iterdir()) == []


def test_overwrite_replaces_only_what_is_complete(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    sink = Encode(path=str(path), overwrite=True)
    decode = Decode(path=str(source))
    spec = decode.plan()
    sink.attach(decode)
    sink.plan(spec)
    for frame in decode.frames():
        sink.write(frame)
        assert path.read_bytes() == b"old"
    sink.finish()
    sink.close()
    assert len(mediagen.video_frames(path)) == 10
    assert sink.report()["size"] == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.mp4"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "out.mp4"
    sink = Encode(path=str(path))
    spec = spec_of("yuv420p")
    sink.plan(spec)
    for frame in frames(spec, 3):
        sink.write(frame)
    path.write_bytes(b"somebody else's")
    with pytest.raises(OutputError, match="appeared meanwhile"):
        sink.finish()
    sink.close()
    assert path.read_bytes() == b"somebody else's"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.mp4"]


_FILL = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import mediagen, test_media_refuse as t
from vidpipe.errors import OutputError
from vidpipe.media.encode import Encode
from vidpipe.stage import FrameSource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
spec = t.spec_of("yuv444p", (128, 96))
path = Path(sys.argv[1])
try:
    mediagen.copy(
        FrameSource(spec, t.frames(spec, 20)), Encode(path=str(path), codec="ffv1")
    )
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(out / "out.mkv"), str(here), str(here.parent)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "larger than a file may be" in done.stdout
    assert list(out.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, timeout=10, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


@pytest.mark.parametrize("suffix", ["mkv", "mov"])
def test_full_disk_is_told_and_nothing_is_left(small_disk: Path, suffix: str) -> None:
    codec = "ffv1" if suffix == "mkv" else "prores"
    spec = spec_of("yuv422p10le", (256, 192))
    sink = Encode(path=str(small_disk / f"out.{suffix}"), codec=codec)
    with pytest.raises(OutputError, match="no space left") as caught:
        copy(FrameSource(spec, frames(spec, 30)), sink)
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_system_errors_in_words(number: int, words: str) -> None:
    error = output_error(Path("out.mp4"), OSError(number, os.strerror(number)))
    assert words in str(error)
    assert "out.mp4" in str(error)
