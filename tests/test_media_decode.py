"""Frames out of files: every one, at its own time, whatever the file is like."""

from __future__ import annotations

import gc
import itertools
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import mediagen
import numpy as np
import pytest
from conftest import SHARED_CLIPS
from mediagen import Audio

from vidpipe.errors import MediaError
from vidpipe.frame import PIXEL_FORMATS, Matrix, Range
from vidpipe.media.convert import frame_from, nearest_format, planes_of
from vidpipe.media.decode import Decode


def read(path: Path, **options: Any) -> tuple[Decode, list[Any]]:
    source = Decode(path=str(path), **options)
    source.plan()
    return source, list(source.frames())


def test_every_frame_with_its_own_time(tmp_path: Path) -> None:
    """Variable rate, a first pts that is not zero, and B frames."""
    pts = [300, 340, 360, 500, 501, 740, 1000, 1010, 1333, 1400]
    path = mediagen.make(
        tmp_path / "in.mp4", pts=pts, time_base=Fraction(1, 1000), options={"bf": "3"}
    )
    source, frames = read(path)
    assert [f.pts * f.spec.time_base for f in frames] == [Fraction(p, 1000) for p in pts]
    assert source.report()["repaired_timestamps"] == 0
    assert source.report()["frames"] == len(pts)
    assert not source.report()["damaged"]
    assert source.expected_frames == len(pts)


@pytest.mark.parametrize("format", ["yuv420p", "yuv422p10le", "yuv444p", "gray10le", "gbrp12le"])
@pytest.mark.parametrize("size", [(64, 48), (65, 47)])
def test_planes_are_the_pictures_own_memory(
    tmp_path: Path, format: str, size: tuple[int, int]
) -> None:
    path = mediagen.make(
        tmp_path / "in.mkv",
        codec="ffv1",
        pix_fmt=format,
        size=size,
        frames=3,
        options={"level": "3"},
    )
    source, frames = read(path)
    spec = frames[0].spec
    assert spec == source.plan()
    assert (spec.format.name, spec.width, spec.height) == (format, *size)
    for i, frame in enumerate(frames):
        expected = mediagen.pattern(PIXEL_FORMATS[format], *size, i)
        assert tuple(p.shape for p in frame.planes) == spec.plane_shapes()
        for plane, wanted in zip(frame.planes, expected, strict=True):
            assert plane.dtype == spec.format.dtype
            assert not plane.flags.owndata
            np.testing.assert_array_equal(plane, wanted)


def test_planes_outlive_frame_and_source(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=5)
    _, frames = read(path)
    plane = frames[2].planes[0]
    before = plane.copy()
    del frames
    gc.collect()
    np.testing.assert_array_equal(plane, before)
    with pytest.raises(ValueError, match="read-only"):
        plane[0, 0] = 1  # the decoder may still predict from it


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_pictures_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    path = mediagen.make(
        tmp_path / "in.mp4",
        frames=250,
        size=(640, 360),
        options={"preset": "ultrafast"},
        picture=lambda f, w, h, i: mediagen.flat(f, w, h, i % 2),
    )

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    source = Decode(path=str(path))
    source.plan()
    gc.collect()
    gc.disable()
    try:
        sizes = [resident() for _ in source.frames()]
    finally:
        gc.enable()
    assert len(sizes) == 250
    assert sizes[-1] - sizes[40] < 20 * 640 * 360 * 3 // 2  # 250 of them would be 86 MB


def test_planes_go_back_into_a_frame_without_a_copy() -> None:
    for name in ("yuv420p", "yuv420p10le", "nv12", "p010le", "gray", "gbrp"):
        format = PIXEL_FORMATS[name]
        planes = tuple(np.ascontiguousarray(p) for p in mediagen.pattern(format, 64, 48, 1))
        frame = frame_from(planes, format, share=True)
        for plane, again in zip(planes, planes_of(frame, format), strict=True):
            assert again.ctypes.data == plane.ctypes.data
            np.testing.assert_array_equal(again, plane)
        alive = [weakref.ref(p) for p in planes]
        address = [p.ctypes.data for p in planes]
        del planes, plane, again
        gc.collect()
        assert all(r() is not None for r in alive), "FFmpeg's frame must hold on to the arrays"
        assert [v.ctypes.data for v in planes_of(frame, format)] == address
        del frame
        gc.collect()
        assert all(r() is None for r in alive)


def test_decoded_planes_are_encoded_without_a_copy(tmp_path: Path) -> None:
    _, frames = read(mediagen.make(tmp_path / "in.mp4", frames=2, size=(128, 96)))
    frame = frames[1]
    picture = frame_from(frame.planes, frame.spec.format, share=True)
    for plane, again in zip(frame.planes, planes_of(picture, frame.spec.format), strict=True):
        assert again.ctypes.data == plane.ctypes.data


def test_planes_with_odd_sizes_and_pitch_are_copied_exactly() -> None:
    for name in ("yuv420p", "nv12", "p210le", "yuv422p12le", "gbrp16le"):
        format = PIXEL_FORMATS[name]
        big = mediagen.pattern(format, 81, 65, 1)
        shapes = format.plane_shapes(64, 48)
        for planes in (
            mediagen.pattern(format, 63, 47, 1),
            tuple(p[: s[0], : s[1]] for p, s in zip(big, shapes, strict=True)),
            tuple(p[::-1] for p in mediagen.pattern(format, 64, 48, 1)),
        ):
            frame = frame_from(planes, format, share=True)
            for plane, again in zip(planes, planes_of(frame, format), strict=True):
                np.testing.assert_array_equal(again, plane)


@pytest.mark.parametrize(
    ("name", "link", "same"),
    [
        ("yuv420p", "yuv420p", True),
        ("yuvj422p", "yuv422p", True),
        ("nv12", "nv12", True),
        ("p010le", "p010le", True),
        ("yuv410p", "yuv444p", False),
        ("yuv411p", "yuv444p", False),
        ("yuv440p", "yuv444p", False),
        ("yuyv422", "yuv422p", False),
        ("uyvy422", "yuv422p", False),
        ("nv21", "yuv420p", False),
        ("yuv420p9le", "yuv420p10le", False),
        ("yuv422p14le", "yuv422p16le", False),
        ("yuv420p10be", "yuv420p10le", False),
        ("gray9le", "gray10le", False),
        ("monob", "gray", False),
        ("rgb24", "gbrp", False),
        ("bgr0", "gbrp", False),
        ("pal8", "gbrp", False),
        ("rgb48le", "gbrp16le", False),
        ("x2rgb10le", "gbrp10le", False),
        ("gbrp14le", "gbrp16le", False),
        ("y210le", "yuv422p10le", False),
    ],
)
def test_link_format_of_a_decoder_format(name: str, link: str, same: bool) -> None:
    assert nearest_format(name) == (PIXEL_FORMATS[link], same)


def test_formats_without_an_equal_are_refused() -> None:
    for name in ("xyz12le", "gbrpf32le", "bayer_rggb8"):
        with pytest.raises(MediaError, match="no lossless equal"):
            nearest_format(name)
    for name in ("yuva420p", "rgba", "ya8"):
        with pytest.raises(MediaError, match="--drop alpha"):
            nearest_format(name)
    assert nearest_format("yuva420p", allow_alpha_loss=True)[0].name == "yuv420p"


@pytest.mark.parametrize(
    ("codec", "format", "link"),
    [
        ("ffv1", "yuv411p", "yuv444p"),
        ("ffv1", "bgr0", "gbrp"),
        ("ffv1", "gbrp9le", "gbrp10le"),
        ("png", "rgb24", "gbrp"),
        ("rawvideo", "yuyv422", "yuv422p"),
    ],
)
def test_other_formats_are_brought_to_a_link_format(
    tmp_path: Path, codec: str, format: str, link: str
) -> None:
    """Every sample of the packed formats arrives, checked against PyAV's own reading."""
    path = tmp_path / ("in.mov" if codec == "png" else "in.mkv")
    mediagen.make(path, codec=codec, pix_fmt=format, size=(64, 48), frames=2)
    source, frames = read(path)
    assert source.plan().format.name == link
    for frame in frames:
        assert frame.spec.format.name == link
        assert frame.planes[0].shape == (48, 64)
    if link.startswith("gbrp") and format in ("bgr0", "rgb24"):
        assert frames[0].spec.color.range == Range.FULL
        with av.open(str(path)) as container:
            for picture, frame in zip(container.decode(video=0), frames, strict=True):
                rgb = picture.to_ndarray(format="rgb24")
                for plane, channel in zip(frame.planes, (1, 2, 0), strict=True):
                    np.testing.assert_array_equal(plane, rgb[..., channel])


def test_jpeg_range_becomes_a_tag(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mkv", codec="mjpeg", pix_fmt="yuvj420p", frames=2)
    _, frames = read(path)
    assert frames[0].spec.format.name == "yuv420p"
    assert frames[0].spec.color.range == Range.FULL


def test_alpha_is_refused_or_dropped(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mkv", codec="ffv1", pix_fmt="yuva420p", frames=2)
    with pytest.raises(MediaError, match="--drop alpha"):
        Decode(path=str(path)).plan()
    source, frames = read(path, drop=["alpha"])
    assert source.plan().format.name == "yuv420p"
    assert len(frames) == 2


@pytest.mark.parametrize(("start_s", "duration_s"), [(0, 0.5), (0.7, None), (1.02, 0.9), (3.5, 9)])
def test_excerpt_is_exact_to_the_frame(
    tmp_path: Path, start_s: float, duration_s: float | None
) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=100, options={"g": "30", "bf": "2"})
    _, everything = read(path)
    source, frames = read(path, start_s=start_s, duration_s=duration_s)
    end_s = start_s + (duration_s or 99)
    wanted = [f for f in everything if start_s <= f.pts * f.spec.time_base < end_s]
    assert [f.pts for f in frames] == [f.pts for f in wanted]
    for frame, other in zip(frames, wanted, strict=True):
        np.testing.assert_array_equal(frame.planes[0], other.planes[0])
    assert source.expected_s == pytest.approx(len(wanted) / 25, abs=0.05)


def test_excerpt_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = mediagen.make(
        tmp_path / "in.ts", pts=[1000 + 40 * i for i in range(50)], time_base=Fraction(1, 1000)
    )
    _, frames = read(path, start_s=0.4, duration_s=0.4)
    assert len(frames) == 10
    first = read(path)[1][0]
    assert (frames[0].pts - first.pts) * frames[0].spec.time_base == Fraction(2, 5)


def test_excerpt_that_begins_behind_the_end_is_refused(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=25)
    with pytest.raises(MediaError, match="starts at 5 s"):
        Decode(path=str(path), start_s=5.0).plan()
    with pytest.raises(MediaError, match="no excerpt"):
        Decode(path=str(path), duration_s=0)


def test_stop_ends_at_the_next_frame(tmp_path: Path) -> None:
    source = Decode(path=str(mediagen.make(tmp_path / "in.mp4", frames=30)))
    source.plan()
    seen = 0
    for _ in source.frames():
        seen += 1
        if seen == 7:
            source.stop()
    assert seen == 7
    assert not source.report()["complete"]
    assert source.report()["lost_s"] == 0


def test_edit_list_is_respected(tmp_path: Path) -> None:
    """Frames before zero are hidden by an edit list; a player does not show them."""
    pts = [i * 512 for i in range(-10, 30)]
    path = mediagen.make(tmp_path / "in.mp4", pts=pts, time_base=Fraction(1, 12800))
    source, frames = read(path)
    assert [f.pts for f in frames] == [i * 512 for i in range(30)]
    assert source.report()["lost_s"] == 0


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_interlaced_is_deinterlaced_by_its_flags(tmp_path: Path, codec: str) -> None:
    options = {"flags": "+ildct+ilme", "b": "4M"}

    def combed(format: Any, width: int, height: int, seed: int) -> Any:
        planes = mediagen.flat(format, width, height, 0.3)
        planes[0][::2, 7 * seed : 7 * seed + 10] = 200
        planes[0][1::2, 7 * seed + 4 : 7 * seed + 14] = 200
        return planes

    path = mediagen.make(
        tmp_path / "in.mkv",
        codec=codec,
        interlaced=True,
        options=options,
        picture=combed,
        frames=20,
    )
    _, raw = read(path, deinterlace="never")
    source, frames = read(path)
    assert [f.pts for f in frames] == [f.pts for f in raw]
    assert [f.duration for f in frames] == [f.duration for f in raw]
    assert source.report()["deinterlaced_frames"] == len(frames)

    def combing(plane: Any) -> float:
        rows = plane.astype(float)
        return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())

    assert combing(frames[9].planes[0]) < 0.4 * combing(raw[9].planes[0])


def test_progressive_is_not_touched_unless_asked(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=5)
    _, plain = read(path, deinterlace="never")
    source, auto = read(path)
    forced, always = read(path, deinterlace="always")
    for a, b in zip(auto, plain, strict=True):
        np.testing.assert_array_equal(a.planes[0], b.planes[0])
    assert source.report()["deinterlaced_frames"] == 0
    assert forced.report()["deinterlaced_frames"] == 5
    assert [f.pts for f in always] == [f.pts for f in plain]
    with pytest.raises(MediaError, match="deinterlace is 'maybe'"):
        Decode(path=str(path), deinterlace="maybe")


def flipped(path: Path, at: float, count: int = 600) -> Path:
    content = bytearray(path.read_bytes())
    begin = int(len(content) * at)
    for i in range(begin, min(begin + count, len(content))):
        content[i] ^= 0x5A
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
def test_damage_in_the_middle_is_skipped_and_told(tmp_path: Path, suffix: str) -> None:
    path = mediagen.make(
        tmp_path / f"in.{suffix}", codec="mpeg4", frames=60, options={"g": "10", "b": "1M"}
    )
    source, frames = read(flipped(path, 0.5, 3000))
    report = source.report()
    pts = [f.pts for f in frames]
    assert pts == sorted(set(pts))
    assert len(frames) >= 45
    assert frames[-1].time_s - frames[0].time_s == pytest.approx(59 / 25, abs=0.05)
    assert report["complete"]
    told = report["damaged_frames"] + report["corrupt_packets"] + report["read_errors"]
    assert told > 0 or report["gaps_s"] > 0
    assert report["damaged"] or report["gaps_s"] > 0


def test_truncated_file_gives_what_there_is_and_says_what_is_not(tmp_path: Path) -> None:
    for name, options in (("in.mkv", {}), ("in.mp4", {"movflags": "faststart"})):
        path = mediagen.make(
            tmp_path / name, frames=100, options={"g": "10"}, container_options=options
        )
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 6 // 10])
        source, frames = read(path)
        report = source.report()
        assert 30 <= len(frames) <= 70
        assert report["declared_duration_s"] == pytest.approx(4.0, abs=0.05)
        assert report["lost_s"] == pytest.approx(4.0 - len(frames) / 25, abs=0.1)
        assert report["damaged"]


def test_size_change_in_mid_stream_gives_a_new_spec(tmp_path: Path) -> None:
    raw = mediagen.raw_video("libx264", (160, 96), 5) + mediagen.raw_video("libx264", (128, 64), 5)
    source, frames = read(mediagen.remux(raw, tmp_path / "in.ts"))
    sizes = [(f.spec.width, f.spec.height) for f in frames]
    assert sizes == [(160, 96)] * 5 + [(128, 64)] * 5
    assert frames[0].spec is frames[4].spec
    assert frames[7].planes[0].shape == (64, 128)
    assert len(source.report()["changes"]) == 1


def test_colour_change_in_mid_stream_gives_a_new_spec(tmp_path: Path) -> None:
    raw = mediagen.raw_video("libx264", (160, 96), 3, colorspace="bt709")
    raw += mediagen.raw_video("libx264", (160, 96), 3, colorspace="smpte170m")
    _, frames = read(mediagen.remux(raw, tmp_path / "in.ts"))
    assert [f.spec.color.matrix for f in frames] == [Matrix.BT709] * 3 + [Matrix.SMPTE170M] * 3


def test_timestamps_that_start_again_go_on(tmp_path: Path) -> None:
    """Two recordings after each other, as capture programs leave them."""
    one = mediagen.make(tmp_path / "one.ts", frames=50, pts=None)
    two = tmp_path / "two.ts"
    two.write_bytes(one.read_bytes() * 2)
    source, frames = read(two)
    assert len(frames) == 100
    pts = [f.pts for f in frames]
    assert {b - a for a, b in itertools.pairwise(pts)} == {3600}
    assert source.report()["discontinuities"] == 1


def test_missing_and_repeated_timestamps_are_repaired() -> None:
    from vidpipe.media.decode import _Clock, _Counts

    counts = _Counts()
    clock = _Clock(counts, Fraction(1, 1000), Fraction(25))
    given = [0, 40, 40, None, 120, 119, 160]
    got = [clock.next(p, 40) for p in given]
    assert got == [0, 40, 41, 81, 120, 121, 160]
    assert counts.repaired == 3


def test_an_elementary_stream_without_times_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.h264"
    path.write_bytes(mediagen.raw_video("libx264", (160, 96), 10))
    _, frames = read(path)
    pts = [f.pts for f in frames]
    assert len(pts) == 10
    assert len({b - a for a, b in itertools.pairwise(pts)}) == 1


def test_stream_is_chosen_by_index(tmp_path: Path) -> None:
    path = mediagen.make(tmp_path / "in.mkv", frames=3, audio=[Audio()])
    assert read(path, stream=0)[0].plan().width == 160
    with pytest.raises(MediaError, match="stream 7"):
        Decode(path=str(path), stream=7).plan()


def test_nothing_stays_open(tmp_path: Path, no_leaks: None) -> None:
    path = mediagen.make(tmp_path / "in.mp4", frames=10, audio=[Audio()])
    source, frames = read(path)
    iterator = source.frames()
    next(iterator)
    iterator.close()
    source.close()
    assert len(frames) == 10


@pytest.mark.skipif(not SHARED_CLIPS.is_dir(), reason="needs the shared clips")
@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [
        ("city-night.mpg", 101, (720, 405)),
        ("interlaced.mp4", 21, (720, 480)),
        ("vfr.mp4", 114, (960, 540)),
    ],
)
def test_real_clips(name: str, frames: int, size: tuple[int, int]) -> None:
    source, found = read(SHARED_CLIPS / name)
    assert len(found) == frames
    assert (found[0].spec.width, found[0].spec.height) == size
    report = source.report()
    assert not report["damaged"]
    assert report["repaired_timestamps"] == 0
    assert (report["deinterlaced_frames"] > 0) == (name == "interlaced.mp4")
