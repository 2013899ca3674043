"""What goes into a file comes out of it: samples, times, colour and shape."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import mediagen
import numpy as np
import pytest
from conftest import SHARED_CLIPS
from mediagen import copy

from vidpipe.errors import OutputError, SpecError
from vidpipe.frame import PIXEL_FORMATS, Color, Frame, FrameSpec
from vidpipe.media.decode import Decode
from vidpipe.media.encode import Encode
from vidpipe.media.hdr import hdr_options
from vidpipe.media.probe import ContentLight, MasteringDisplay, probe
from vidpipe.media.resize import Resize
from vidpipe.stage import FrameSource

MASTERING = MasteringDisplay(
    primaries=(
        (Fraction("0.68"), Fraction("0.32")),
        (Fraction("0.265"), Fraction("0.69")),
        (Fraction("0.15"), Fraction("0.06")),
    ),
    white=(Fraction("0.3127"), Fraction("0.329")),
    luminance=(Fraction("0.005"), Fraction(1000)),
)
LIGHT = ContentLight(1000, 400)


def spec_of(format: str, size: tuple[int, int] = (160, 96), **changes: Any) -> FrameSpec:
    values: dict[str, Any] = {
        "time_base": Fraction(1, 90000),
        "rate": Fraction(25),
        "color": Color(0, 1, 1, 2, 0) if format.startswith("gbr") else Color(1, 1, 1, 1, 0),
    }
    values.update(changes)
    return FrameSpec(width=size[0], height=size[1], format=PIXEL_FORMATS[format], **values)


def frames(spec: FrameSpec, count: int = 5, pts: list[int] | None = None) -> Iterator[Frame]:
    step = round(1 / (25 * spec.time_base))
    for i, at in enumerate(pts or [i * step for i in range(count)]):
        planes = mediagen.pattern(spec.format, spec.width, spec.height, i)
        yield Frame(planes, spec, at, step)


def encoded(path: Path, spec: FrameSpec, count: int = 5, **options: Any) -> dict[str, Any]:
    sink = Encode(path=str(path), **options)
    copy(FrameSource(spec, frames(spec, count)), sink)
    return sink.report()


def read(path: Path) -> list[Frame]:
    source = Decode(path=str(path), deinterlace="never")
    source.plan()
    return list(source.frames())


@pytest.mark.parametrize("size", [(64, 48), (65, 47)])
@pytest.mark.parametrize("name", sorted(PIXEL_FORMATS))
def test_lossless_through_file_and_back(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Decode, encode with FFV1 and decode again: not a bit of the picture is different."""
    format = PIXEL_FORMATS[name]
    color = Color(0, 13, 1, 2, 0) if format.model == "rgb" else Color(9, 16, 9, 1, 0)
    if format.subsampling == (1, 1):
        color = Color(9, 16, 9, 1, 3)
    spec = spec_of(name, size, color=color)
    path = tmp_path / "out.mkv"
    report = encoded(path, spec, 3, codec="ffv1")
    assert report["frames"] == 3
    again = read(path)
    assert len(again) == 3
    for i, frame in enumerate(again):
        planes = mediagen.pattern(format, *size, i)
        if format.interleaved:  # FFV1 keeps NV12 and its like as planar pictures
            luma, chroma = planes
            planes = (luma, chroma[..., 0], chroma[..., 1])
        shift = format.shift
        assert frame.spec.color == color
        assert frame.pts * frame.spec.time_base == Fraction(i, 25)
        for plane, wanted in zip(frame.planes, planes, strict=True):
            np.testing.assert_array_equal(plane, wanted >> shift)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize(
    "color",
    [
        Color(6, 6, 6, 1, 1),
        Color(5, 6, 5, 1, 2),
        Color(1, 1, 1, 1, 1),
        Color(1, 13, 1, 2, 2),
        Color(9, 16, 9, 1, 3),
        Color(9, 18, 9, 2, 3),
        Color(2, 2, 2, 0, 1),
    ],
    ids=str,
)
def test_colour_tags_survive(tmp_path: Path, color: Color, codec: str, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    encoded(path, spec_of("yuv420p", color=color), 2, codec=codec, preset="ultrafast")
    found = probe(path).video.color
    if color.range == 0 and color.matrix == 2:
        # An untagged stream may be read back as limited, which is what untagged means.
        assert (found.matrix, found.transfer, found.primaries) == (2, 2, 2)
        assert found.range in (0, 1)
        return
    assert found == color


@pytest.mark.parametrize(
    ("codec", "format", "suffix"), [("vp9", "yuv420p", "webm"), ("prores", "yuv422p10le", "mov")]
)
def test_colour_tags_survive_in_the_container(
    tmp_path: Path, codec: str, format: str, suffix: str
) -> None:
    color = Color(9, 16, 9, 1, 0)
    path = tmp_path / f"out.{suffix}"
    encoded(path, spec_of(format, color=color), 2, codec=codec)
    found = probe(path).video.color
    assert (found.matrix, found.transfer, found.primaries, found.range) == (9, 16, 9, 1)


@pytest.mark.parametrize(
    ("codec", "link", "suffix", "encoder", "stored"),
    [
        ("h264", "yuv420p", "mp4", "libx264", "yuv420p"),
        ("h264", "nv12", "mp4", "libx264", "nv12"),
        ("h264", "p010le", "mp4", "libx264", "yuv420p10le"),
        ("h264", "yuv422p", "mkv", "libx264", "yuv422p"),
        ("h264", "gray", "mkv", "libx264", "gray"),
        ("hevc", "yuv444p12le", "mkv", "libx265", "yuv444p12le"),
        ("hevc", "gbrp10le", "mp4", "libx265", "gbrp10le"),
        ("av1", "yuv420p", "mp4", "libsvtav1", "yuv420p"),
        ("av1", "gray", "webm", "libsvtav1", "yuv420p"),
        ("av1", "p010le", "mkv", "libsvtav1", "yuv420p10le"),
        ("vp9", "yuv444p", "webm", "libvpx-vp9", "yuv444p"),
        ("prores", "yuv420p", "mov", "prores_ks", "yuv422p10le"),
        ("ffv1", "gbrp", "mkv", "ffv1", "bgr0"),
        ("mpeg4", "yuv420p", "mp4", "mpeg4", "yuv420p"),
        ("mpeg2", "yuv420p", "ts", "mpeg2video", "yuv420p"),
        ("libx264", "yuv420p", "mkv", "libx264", "yuv420p"),
    ],
)
def test_codecs(
    tmp_path: Path, codec: str, link: str, suffix: str, encoder: str, stored: str
) -> None:
    path = tmp_path / f"out.{suffix}"
    spec = spec_of(link)
    report = encoded(path, spec, 6, codec=codec)
    assert (report["encoder"], report["pixel_format"]) == (encoder, stored)
    assert report["frames"] == report["packets"] == 6
    again = read(path)
    assert [f.pts * f.spec.time_base - again[0].time_s for f in again] == pytest.approx(
        [i / 25 for i in range(6)], abs=1e-4
    )
    top = float((1 << again[0].spec.format.bits) - 1)
    for i, frame in enumerate(again):
        want = mediagen.pattern(spec.format, 160, 96, i)[0].astype(float)
        want /= ((1 << spec.format.bits) - 1) << spec.format.shift
        error = frame.planes[0].astype(float) / top - want
        assert np.sqrt((error**2).mean()) < 0.06


def test_default_codec_follows_the_container(tmp_path: Path) -> None:
    for suffix, encoder in (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("ts", "libx264")):
        report = encoded(tmp_path / f"out.{suffix}", spec_of("yuv420p"), 2)
        assert report["encoder"] == encoder


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "ffv1", "mpeg4"])
def test_variable_rate_keeps_every_timestamp(tmp_path: Path, codec: str) -> None:
    pts = [90000, 93003, 93004, 100000, 270000, 270900, 274500, 279000, 290001, 300000]
    spec = spec_of("yuv420p", rate=None)
    for suffix, tick in (("mp4", Fraction(1, 90000)), ("mkv", Fraction(1, 1000))):
        if codec == "ffv1" and suffix == "mp4":
            continue
        path = tmp_path / f"out.{suffix}"
        kept = pts if suffix == "mp4" else [p for p in pts if p != 93004]
        sink = Encode(path=str(path), codec=codec)
        copy(FrameSource(spec, frames(spec, pts=kept)), sink)
        again = [f.pts * f.spec.time_base for f in read(path)]
        for time, wanted in zip(again, kept, strict=True):
            assert abs(time - Fraction(wanted, 90000)) <= tick / 2
        if suffix == "mp4":
            assert again == [Fraction(p, 90000) for p in kept]


def test_transport_streams_keep_their_times(tmp_path: Path) -> None:
    pts = [90000 + i * 3600 + (i % 3) * 7 for i in range(30)]
    spec = spec_of("yuv420p", rate=None)
    copy(FrameSource(spec, frames(spec, pts=pts)), Encode(path=str(tmp_path / "out.ts")))
    assert [f.pts for f in read(tmp_path / "out.ts")] == pts


def test_rotation_shape_and_b_frames_survive(tmp_path: Path) -> None:
    source = mediagen.make(
        tmp_path / "in.mp4",
        frames=20,
        rotation=90,
        sample_aspect_ratio=Fraction(64, 45),
        options={"bf": "3"},
    )
    for suffix, codec in (
        ("mp4", "h264"),
        ("mov", "prores"),
        ("mkv", "ffv1"),
        ("mkv", "h264"),
        ("webm", "vp9"),
        ("mp4", "av1"),
    ):
        path = tmp_path / f"out-{codec}.{suffix}"
        sink = Encode(path=str(path), codec=codec)
        copy(Decode(path=str(source)), sink)
        before, after = probe(source).video, probe(path).video
        assert after.rotation == 90
        assert after.display_matrix == before.display_matrix
        assert after.sample_aspect_ratio == Fraction(64, 45), path.name
        assert mediagen.times(path) == mediagen.times(source)
        assert sink.report()["problems"] == []


def test_patched_matroska_is_sound(tmp_path: Path) -> None:
    """The checksum of the changed header is right, and the title is the source's own."""
    source = mediagen.make(
        tmp_path / "in.mkv",
        sample_aspect_ratio=Fraction(11, 12),
        frames=5,
        video_metadata={"title": "The film"},
    )
    path = tmp_path / "out.mkv"
    copy(Decode(path=str(source)), Encode(path=str(path), codec="ffv1"))
    with av.open(str(path), options={"err_detect": "crccheck+explode"}) as container:
        assert container.streams.video[0].metadata["title"] == "The film"
        assert len(list(container.decode(video=0))) == 5
    assert b"room-for-the-header" not in path.read_bytes()


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("h264", "mp4"),
        ("h264", "ts"),
        ("hevc", "mkv"),
        ("av1", "mp4"),
        ("av1", "mkv"),
        ("prores", "mov"),
        ("ffv1", "mkv"),
    ],
)
def test_hdr10_metadata_survives(tmp_path: Path, codec: str, suffix: str) -> None:
    source = mediagen.make(
        tmp_path / "in.mkv",
        pix_fmt="yuv420p10le",
        frames=4,
        color=Color(9, 16, 9, 1, 3),
        options=hdr_options("libx264", {}, MASTERING, LIGHT),
    )
    assert probe(source).video.mastering_display == MASTERING
    path = tmp_path / f"out.{suffix}"
    copy(Decode(path=str(source)), Encode(path=str(path), codec=codec))
    video = probe(path).video
    assert video.content_light == LIGHT
    found = video.mastering_display
    assert found is not None
    for mine, given in zip(
        [*sum(found.primaries, ()), *found.white, *found.luminance],
        [*sum(MASTERING.primaries, ()), *MASTERING.white, *MASTERING.luminance],
        strict=True,
    ):
        # AV1 stores binary fractions.
        assert float(mine) == pytest.approx(float(given), rel=2e-3)
    assert video.color.transfer == 16
    dropped = tmp_path / f"sdr.{suffix}"
    copy(Decode(path=str(source)), Encode(path=str(dropped), codec=codec, drop=["hdr"]))
    assert probe(dropped).video.mastering_display is None


def test_hdr10_is_also_in_the_container(tmp_path: Path) -> None:
    """Players look for it in the header before they decode a frame."""
    source = mediagen.make(
        tmp_path / "in.mkv",
        pix_fmt="yuv420p10le",
        frames=4,
        color=Color(9, 16, 9, 1, 3),
        options=hdr_options("libx264", {}, MASTERING, LIGHT),
    )
    for name in ("out.mp4", "out.mkv"):
        path = tmp_path / name
        copy(Decode(path=str(source)), Encode(path=str(path)))
        content = path.read_bytes()
        assert (b"mdcv" in content) == (b"clli" in content) == (name == "out.mp4")
        if name == "out.mkv":
            assert b"\x55\xd0" in content[:2000]


def test_captions_survive(tmp_path: Path) -> None:
    raw = mediagen.raw_video("libx264", (160, 96), 12)
    source = mediagen.remux(
        mediagen.with_captions(raw, [b"\x14\x20", b"He", b"ll", b"o!"]), tmp_path / "in.mp4"
    )
    wanted = mediagen.captions(source)
    assert len(wanted) == 12
    for codec, suffix in (("h264", "mp4"), ("hevc", "mkv"), ("mpeg2", "ts")):
        path = tmp_path / f"out-{codec}.{suffix}"
        copy(Decode(path=str(source)), Encode(path=str(path), codec=codec), Resize(scale=2))
        assert mediagen.captions(path) == wanted, codec
        assert probe(path).video.width == 320
    with pytest.raises(OutputError, match=r"closed captions.*--drop captions"):
        copy(Decode(path=str(source)), Encode(path=str(tmp_path / "out.webm")))
    copy(Decode(path=str(source)), Encode(path=str(tmp_path / "out.webm"), drop=["captions"]))
    assert mediagen.captions(tmp_path / "out.webm") == []


def test_frames_of_another_size_are_brought_to_the_first(tmp_path: Path) -> None:
    raw = mediagen.raw_video("libx264", (160, 96), 5) + mediagen.raw_video("libx264", (128, 64), 4)
    source = mediagen.remux(raw, tmp_path / "in.ts")
    sink = Encode(path=str(tmp_path / "out.mp4"))
    copy(Decode(path=str(source)), sink)
    again = read(tmp_path / "out.mp4")
    assert [f.planes[0].shape for f in again] == [(96, 160)] * 9
    assert sink.report()["resized_frames"] == 4


def test_resize(tmp_path: Path) -> None:
    source = mediagen.make(tmp_path / "in.mp4", frames=3, color=Color(9, 16, 9, 1, 3))
    for options, size in (
        ({"scale": 2.0}, (320, 192)),
        ({"width": 100}, (100, 60)),
        ({"height": 48}, (80, 48)),
        ({"width": 33, "height": 77, "kernel": "area"}, (33, 77)),
    ):
        stage = Resize(**options)
        decode = Decode(path=str(source))
        first = decode.plan()
        spec = stage.plan(first)
        stage.open()
        out = [f for frame in decode.frames() for f in stage.process(frame)]
        stage.close()
        assert (spec.width, spec.height) == size
        assert spec.color == first.color
        assert spec.format is first.format
        for frame in out:
            assert tuple(p.shape for p in frame.planes) == spec.plane_shapes()


def test_resize_keeps_flat_grey_and_the_mean() -> None:
    for name in ("yuv420p", "yuv420p10le", "gbrp", "gray16le", "nv12", "yuv444p12le"):
        spec = spec_of(name, (64, 48))
        stage = Resize(width=97, height=31)
        out = stage.plan(spec)
        stage.open()
        flat = mediagen.flat(spec.format, 64, 48, 0.4)
        (frame,) = stage.process(Frame(flat, spec, 0))
        for plane, given in zip(frame.planes, flat, strict=True):
            step = 1 << spec.format.shift
            if spec.format.bits == 16:
                step = 4
            assert np.abs(plane.astype(int) - int(given.flat[0])).max() <= step
        assert out.format is spec.format


@pytest.mark.parametrize(
    "options", [{}, {"scale": 2.0, "width": 5}, {"scale": -1.0}, {"width": 5, "kernel": "magic"}]
)
def test_resize_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Resize(**options)


def test_encoder_options_reach_the_encoder(tmp_path: Path) -> None:
    sizes = []
    for crf in (10, 40):
        report = encoded(tmp_path / f"{crf}.mp4", spec_of("yuv420p"), 5, crf=crf, preset="fast")
        sizes.append(report["size"])
        assert report["encoder_options"]["crf"] == str(crf)
    assert sizes[0] > 2 * sizes[1]
    report = encoded(
        tmp_path / "g.mkv", spec_of("yuv420p"), 9, encoder_options={"g": "3", "tune": "grain"}
    )
    with av.open(str(tmp_path / "g.mkv")) as container:
        keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
    assert keys == [True, False, False] * 3


@pytest.mark.skipif(not SHARED_CLIPS.is_dir(), reason="needs the shared clips")
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
def test_real_clips(tmp_path: Path, suffix: str) -> None:
    for name in ("vfr.mp4", "interlaced.mp4"):
        source = SHARED_CLIPS / name
        path = tmp_path / f"{Path(name).stem}.{suffix}"
        sink = Encode(path=str(path), preset="ultrafast")
        copy(Decode(path=str(source)), sink)
        report = sink.report()
        assert report["problems"] == []
        before, after = mediagen.times(source), mediagen.times(path)
        shift = after[0] - before[0]
        assert float(shift) == pytest.approx(report["start_shift_s"], abs=1e-5)
        tick = Fraction(1, 1000) if suffix == "mkv" else Fraction(1, 90000)
        assert max(abs(a - b - shift) for a, b in zip(after, before, strict=True)) <= tick


@pytest.mark.parametrize(
    ("codec", "suffix", "expected"),
    [("h264", ".mp4", "yuv444p"), ("vp9", ".webm", "gbrp"), ("ffv1", ".mkv", "bgr0")],
)
def test_rgb_keeps_its_colours_whatever_the_encoder_takes(
    tmp_path: Path, codec: str, suffix: str, expected: str
) -> None:
    """Few encoders take R'G'B'; the picture must look the same in Y'CbCr."""
    first = spec_of("gbrp", (64, 48), time_base=Fraction(1, 25))
    ramp = np.linspace(20, 235, 64).astype(np.uint8)
    planes = (
        np.broadcast_to(ramp, (48, 64)).copy(),
        np.full((48, 64), 40, np.uint8),
        np.broadcast_to(ramp[::-1], (48, 64)).copy(),
    )
    path = tmp_path / f"rgb{suffix}"
    sink = Encode(path=str(path), codec=codec, crf=None if codec == "ffv1" else 1.0)
    copy(FrameSource(first, [Frame(planes, first, i) for i in range(5)]), sink)
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == expected
        decoded = next(container.decode(video=0)).reformat(format="gbrp", src_color_range=0)
        for plane, wanted in zip(decoded.planes, planes, strict=True):
            got = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:48, :64]
            assert abs(got.astype(int) - wanted).max() <= 6
    noted = any("rounds its colours" in note for note in sink.report()["notes"])
    assert noted == expected.startswith("yuv")


def test_pictures_become_rgb_when_asked_for(tmp_path: Path) -> None:
    source = mediagen.make(tmp_path / "in.mkv", frames=3)
    path = tmp_path / "out.mkv"
    copy(Decode(path=str(source)), Encode(path=str(path), codec="ffv1", pix_fmt="bgr0"))
    with av.open(str(path)) as container, av.open(str(source)) as original:
        got, wanted = (next(c.decode(video=0)) for c in (container, original))
        assert got.format.name == "bgr0"
        difference = got.reformat(format="rgb24").to_ndarray().astype(int)
        difference -= wanted.reformat(format="rgb24").to_ndarray()
        assert abs(difference).mean() < 3
