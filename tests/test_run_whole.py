"""The main job on a file that holds everything at once: only the picture may change."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import mediagen
import pytest

import vidpipe
from vidpipe.frame import ChromaSite, Color
from vidpipe.media.hdr import hdr_options
from vidpipe.media.probe import ContentLight, MasteringDisplay, probe

pytestmark = pytest.mark.usefixtures("no_leaks")

UHD = Color(matrix=9, transfer=16, primaries=9, range=1, site=ChromaSite.TOPLEFT)
MASTERING = MasteringDisplay(
    primaries=(
        (Fraction(34000, 50000), Fraction(16000, 50000)),
        (Fraction(13250, 50000), Fraction(34500, 50000)),
        (Fraction(7500, 50000), Fraction(3000, 50000)),
    ),
    white=(Fraction(15635, 50000), Fraction(16450, 50000)),
    luminance=(Fraction(1, 10000), Fraction(1000)),
)
LIGHT = ContentLight(max_cll=1000, max_fall=400)
# Milliseconds, uneven: a variable frame rate that does not begin at zero.
TIMES = [480 + 40 * i + (7 * i * i) % 29 for i in range(30)]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mediagen.make(
        tmp_path_factory.mktemp("everything") / "in.mkv",
        codec="libx265",
        pix_fmt="yuv420p10le",
        size=(98, 54),
        frames=len(TIMES),
        time_base=Fraction(1, 1000),
        pts=TIMES,
        color=UHD,
        options={"preset": "ultrafast", **hdr_options("libx265", {}, MASTERING, LIGHT)},
        sample_aspect_ratio=Fraction(4, 3),
        audio=[
            mediagen.Audio(codec="aac", language="eng", title="Main"),
            mediagen.Audio(codec="flac", language="fra", title="Commentaire"),
        ],
        subtitles=[mediagen.Subtitles(language="deu")],
        chapters=[(0.0, 0.6, "One"), (0.6, 1.2, "Two")],
        attachments=[("font.ttf", "font/ttf", b"\x00\x01font" * 50)],
        metadata={"title": "Everything", "artist": "Nobody"},
    )


def fonts(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(s.data) for s in container.streams if s.type == "attachment"]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_only_the_picture_changes(everything: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    drop = [] if suffix == ".mkv" else ["attachments"]
    report = vidpipe.enhance(everything, path, codec="hevc", preset="ultrafast", drop=drop)
    assert report.problems == []

    before, after = probe(everything), probe(path)
    assert (after.video.width, after.video.height) == (196, 108)
    assert after.video.pixel_format == before.video.pixel_format == "yuv420p10le"
    assert after.video.color == before.video.color
    assert after.video.sample_aspect_ratio == Fraction(4, 3)
    assert after.video.mastering_display == MASTERING
    assert after.video.content_light == LIGHT
    assert after.metadata["title"] == "Everything"
    assert [c.title for c in after.chapters] == ["One", "Two"]

    assert mediagen.times(path) == mediagen.times(everything)
    # MP4 keeps chapters in a text track, which reads as data.
    kinds = ["video", "audio", "audio", "subtitle"]
    kinds += ["attachment"] if suffix == ".mkv" else ["data"]
    assert [s.kind for s in after.streams] == kinds
    for index, language in ((0, "eng"), (1, "fra")):
        tracks = [s for s in after.streams if s.kind == "audio"]
        assert tracks[index].language == language
        assert mediagen.payloads(path, "audio", index) == mediagen.payloads(
            everything, "audio", index
        )
        (start, sound), (start_before, sound_before) = (
            mediagen.samples(p, index) for p in (path, everything)
        )
        assert abs(start - start_before) < 0.0015
        # Containers count the padding at the end differently, by less than an audio frame.
        both = min(len(sound), len(sound_before))
        assert abs(len(sound) - len(sound_before)) < 1024
        assert (sound[:both] == sound_before[:both]).all()
    subtitles = [s for s in after.streams if s.kind == "subtitle"]
    assert subtitles[0].language == "deu"
    if suffix == ".mkv":
        assert fonts(path) == fonts(everything) != []


def test_what_mp4_cannot_hold_is_named_before_anything_starts(
    everything: Path, tmp_path: Path
) -> None:
    with pytest.raises(vidpipe.VidpipeError, match=r"attachment.*--drop"):
        vidpipe.enhance(everything, tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []
