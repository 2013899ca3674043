import json
import math
from fractions import Fraction

import av
import numpy as np
import pytest

from vidpipe import compare as module
from vidpipe.compare import compare, has_vmaf, psnr, ssim, write_png
from vidpipe.errors import InputError, MediaError

W, H, FRAMES = 192, 128, 8


def scene(number):
    y, x = np.mgrid[:H, :W]
    values = 120 + 50 * np.sin((x + 3 * number) / 7) + 40 * np.cos(y / 5)
    return np.clip(values, 16, 235)


def write(path, planes, codec="ffv1", pix_fmt="yuv420p"):
    """Lossless by default, so that the figures are those of the planes."""
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream(codec, rate=25)
        stream.height, stream.width = planes[0].shape
        stream.pix_fmt = pix_fmt
        for number, plane in enumerate(planes):
            height, width = plane.shape
            packed = np.full((height * 3 // 2, width), 128, np.uint8)
            packed[:height] = np.rint(plane)
            frame = av.VideoFrame.from_ndarray(packed, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            sink.mux(stream.encode(frame.reformat(format=pix_fmt)))
        sink.mux(stream.encode(None))
    return path


@pytest.fixture
def reference(tmp_path):
    return write(tmp_path / "ref.mkv", [scene(i) for i in range(FRAMES)])


def noisy(sigma, seed=0):
    rng = np.random.default_rng(seed)
    return [np.clip(scene(i) + rng.normal(0, sigma, (H, W)), 0, 255) for i in range(FRAMES)]


def test_psnr_is_the_formula_and_100_for_equal_planes():
    a = np.full((16, 16), 100, np.float32)
    assert psnr(a, a) == 100
    assert psnr(a, a + 2) == pytest.approx(10 * math.log10(255**2 / 4))


def test_ssim_agrees_with_ffmpeg(tmp_path):
    a = scene(0).round().astype(np.float32)
    b = noisy(6)[0].round().astype(np.float32)
    graph = av.filter.Graph()
    log = tmp_path / "ssim.txt"
    inputs = [
        graph.add_buffer(width=W, height=H, format="gray", time_base=Fraction(1, 25), name=name)
        for name in ("a", "b")
    ]
    node = graph.add("ssim", f"stats_file={log.as_posix()}")
    sink = graph.add("buffersink")
    for i, entry in enumerate(inputs):
        entry.link_to(node, 0, i)
    node.link_to(sink)
    graph.configure()
    for entry, plane in zip(inputs, (a, b), strict=True):
        frame = av.VideoFrame.from_ndarray(plane.astype(np.uint8), format="gray")
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        entry.push(frame)
        entry.push(None)
    found = sink.pull().metadata if hasattr(av.VideoFrame, "metadata") else {}
    if "lavfi.ssim.Y" not in found:
        pytest.skip("this PyAV does not show the filter's metadata")
    assert ssim(a, b) == pytest.approx(float(found["lavfi.ssim.Y"]), abs=2e-4)


def test_an_exact_copy_is_perfect(reference):
    score = compare(reference, [reference], vmaf=False).scores[0]
    assert (score.psnr_db, score.ssim, score.flicker) == (100, pytest.approx(1), 0)
    assert score.frames == FRAMES
    assert score.vmaf_neg is None


def test_known_noise_gives_known_figures(reference, tmp_path):
    flat = write(tmp_path / "flat.mkv", [scene(i) + 4 for i in range(FRAMES)])
    flickering = write(tmp_path / "flicker.mkv", [scene(i) + 4 * (i % 2) for i in range(FRAMES)])
    result = compare(reference, [flat, flickering], vmaf=False)
    assert result.scores[0].psnr_db == pytest.approx(10 * math.log10(255**2 / 16), abs=0.05)
    assert result.scores[0].flicker == pytest.approx(0, abs=0.05)
    assert result.scores[1].flicker == pytest.approx(4, abs=0.05)
    assert json.loads(json.dumps(result.as_dict()))["scores"][1]["frames"] == FRAMES


def test_ten_bits_are_put_on_the_same_scale(reference, tmp_path):
    deep = write(tmp_path / "deep.mkv", [scene(i) for i in range(FRAMES)], pix_fmt="yuv420p10le")
    assert compare(reference, [deep], vmaf=False).scores[0].psnr_db > 55


def test_the_sheet_shows_the_worst_places(reference, tmp_path):
    planes = [scene(i) for i in range(FRAMES)]
    planes[5][64:, 64:] = 16
    damaged = write(tmp_path / "damaged.mkv", planes)
    sheet = tmp_path / "sheet.png"
    result = compare(reference, [reference, damaged], sheet=sheet, vmaf=False)
    assert result.places[0].frame == 5
    assert result.places[0].x > 0
    with av.open(str(sheet)) as picture:
        frame = next(picture.decode(video=0))
    crop = min(module.CROP, W, H)
    assert frame.width == 3 * crop + 2 * 4
    assert (frame.height + 4) % (crop + 4) == 0


def test_a_longer_clip_ends_with_the_shortest(reference, tmp_path):
    short = write(tmp_path / "short.mkv", [scene(i) for i in range(3)])
    assert compare(reference, [short], vmaf=False).scores[0].frames == 3
    assert compare(reference, [reference], vmaf=False, max_frames=2).scores[0].frames == 2


def test_errors_say_what_was_got(reference, tmp_path):
    other = write(tmp_path / "other.mkv", [scene(0)[:64, :64]])
    with pytest.raises(InputError, match="got 64x64, expected 192x128"):
        compare(reference, [other])
    with pytest.raises(InputError, match="at least one"):
        compare(reference, [])
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(b"no video")
    with pytest.raises(MediaError, match=r"broken\.mkv"):
        compare(reference, [broken])
    with pytest.raises(InputError, match="8x8"):
        ssim(np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32))


def test_png_comes_back_as_it_went(tmp_path):
    picture = np.random.default_rng(1).integers(0, 256, (10, 14, 3), np.uint8)
    write_png(tmp_path / "a.png", picture)
    with av.open(str(tmp_path / "a.png")) as source:
        assert np.array_equal(next(source.decode(video=0)).to_ndarray(format="rgb24"), picture)


@pytest.mark.skipif(not has_vmaf(), reason="the FFmpeg inside this PyAV has no libvmaf")
def test_vmaf_falls_with_noise(reference, tmp_path):
    little, much = (write(tmp_path / f"{s}.mkv", noisy(s)) for s in (2, 15))
    scores = compare(reference, [reference, little, much]).scores
    assert scores[0].vmaf_neg > scores[1].vmaf_neg > scores[2].vmaf_neg
