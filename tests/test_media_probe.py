"""What `probe` finds, and what it refuses."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import mediagen
import pytest
from mediagen import Audio, Subtitles

from vidpipe.errors import MediaError
from vidpipe.frame import Color
from vidpipe.media.decode import Decode
from vidpipe.media.headers import display_size
from vidpipe.media.probe import probe


def test_probe_finds_what_is_there(tmp_path: Path) -> None:
    path = mediagen.make(
        tmp_path / "in.mkv",
        sample_aspect_ratio=Fraction(11, 12),
        rotation=90,
        color=Color(1, 1, 1, 1, 3),
        audio=[Audio(language="eng", disposition=1), Audio("ac3", "deu")],
        subtitles=[Subtitles(language="eng", disposition=64)],
        chapters=[(0, 0.5, "One"), (0.5, 1.6, "Two")],
        attachments=[("font.ttf", "font/ttf", b"\0\1\0\0" + bytes(96))],
        metadata={"title": "A title"},
    )
    info = probe(path)
    assert info.container.startswith("matroska")
    assert info.size == path.stat().st_size
    kinds = [(s.kind, s.codec, s.language) for s in info.streams]
    assert kinds == [
        ("video", "h264", None),
        ("audio", "aac", "eng"),
        ("audio", "ac3", "deu"),
        ("subtitle", "subrip", "eng"),
        ("attachment", "unknown", None),
    ]
    assert info.streams[1].disposition == ("default",)
    assert info.streams[3].disposition == ("forced",)
    assert info.streams[1].details == {"sample_rate": 48000, "channels": 2, "layout": "stereo"}
    assert info.streams[4].details == {"name": "font.ttf", "bytes": 100}
    video = info.video
    assert (video.width, video.height, video.pixel_format) == (160, 96, "yuv420p")
    assert (video.rate, video.rate_mode) == (25, "constant")
    assert video.sample_aspect_ratio == Fraction(11, 12)
    assert video.rotation == 90
    assert video.display_matrix is not None
    assert len(video.display_matrix) == 9
    assert video.color == Color(1, 1, 1, 1, 3)
    assert not video.interlaced
    assert [(c.title, c.start_s, c.end_s) for c in info.chapters] == [
        ("One", 0.0, 0.5),
        ("Two", 0.5, 1.6),
    ]
    assert info.metadata["title"] == "A title"
    again = json.loads(json.dumps(info.to_dict()))
    assert again["video"]["sample_aspect_ratio"] == "11/12"
    assert again["video"]["color"]["site"] == 3


@pytest.mark.parametrize("site", [1, 2, 3, 4, 5, 6])
def test_chroma_site_is_found(tmp_path: Path, site: int) -> None:
    if site > 4 and not hasattr(av.VideoFrame, "chroma_location"):
        pytest.skip("this PyAV does not tell of sites at the bottom")
    path = mediagen.make(tmp_path / "in.mp4", frames=2, color=Color(1, 1, 1, 1, site))
    assert probe(path).video.color.site == site
    assert Decode(path=str(path)).plan().color == Color(1, 1, 1, 1, site)


def test_rates_are_named_as_they_are_meant(tmp_path: Path) -> None:
    for rate in (Fraction(30000, 1001), Fraction(25, 2), Fraction(24), Fraction(60000, 1001)):
        for suffix in ("mp4", "mkv", "ts"):
            path = mediagen.make(tmp_path / f"in.{suffix}", rate=rate, frames=30)
            video = probe(path).video
            if suffix == "ts" and rate == Fraction(25, 2):
                continue  # a rate that H.264 in a transport stream does not tell
            assert (video.rate, video.rate_mode) == (rate, "constant"), suffix
    pts = [0, 40, 80, 160, 170, 400, 440, 480, 720]
    path = mediagen.make(tmp_path / "v.mp4", pts=pts, time_base=Fraction(1, 1000))
    assert probe(path).video.rate_mode == "variable"
    assert Decode(path=str(path)).plan().rate is None


def test_attached_cover_is_not_the_video(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mp4", cover=True, frames=5)
    info = probe(path)
    assert [s.kind for s in info.streams] == ["video", "cover"]
    assert info.video_index == 0


def refused(path: Path, *words: str) -> None:
    with pytest.raises(MediaError) as caught:
        probe(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in (*words, path.name):
        assert word in text, text


def test_files_that_are_no_video_are_refused_in_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "missing.mp4", "does not exist")
    refused(tmp_path, "directory")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, "empty")
    text = tmp_path / "text.mp4"
    text.write_text("This is no film.\n" * 100)
    refused(text, "not a readable media file")
    sound = mediagen.make(tmp_path / "sound.m4a", video=False, audio=[Audio()], container="mp4")
    refused(sound, "no video stream, only audio")
    cover = mediagen.make(
        tmp_path / "cover.m4a", video=False, audio=[Audio()], cover=True, container="mp4"
    )
    refused(cover, "no video stream, only audio and cover")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=2)
    path.chmod(0)
    refused(path, "permission denied")


def test_unfinished_mp4_says_what_is_missing(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=20)
    path.write_bytes(path.read_bytes()[:-400])
    refused(path, "moov", "not complete")


def test_stream_of_unknown_codec_is_refused(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mkv", frames=3)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))
    refused(path, "no decoder", "stream 0")


def test_stream_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mkv", frames=3, audio=[Audio()])
    with pytest.raises(MediaError, match=r"stream 1 .* is not a video stream"):
        probe(path, stream=1)


def test_display_size_has_exactly_the_shape() -> None:
    for width, height, aspect in (
        (720, 480, Fraction(11, 12)),
        (720, 576, Fraction(64, 45)),
        (1279, 719, Fraction(4, 3)),
        (64, 64, Fraction(1, 3)),
    ):
        shown = display_size(width, height, aspect)
        assert Fraction(*shown) == Fraction(width, height) * aspect
        assert shown[0] >= width
        assert shown[1] >= height
