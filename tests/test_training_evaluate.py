"""How the figures of the built-in models are made: files through vidpipe, measured by compare."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

pytest.importorskip("PIL")
from training import evaluate
from training.pictures import plane
from vidpipe.compare import psnr
from vidpipe.model.descriptor import MODELS

W, H, RATE, SECONDS = 96, 64, 10, 4


def scene(number):
    y, x = np.mgrid[:H, :W]
    discs = np.hypot((x + number) % 32 - 16, y % 32 - 16) < 11
    return np.where(discs, 180, 60).astype(np.uint8)


@pytest.fixture
def clips(tmp_path):
    with av.open(str(tmp_path / "waves.mkv"), "w") as sink:
        stream = sink.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for number in range(SECONDS * RATE):
            frame = evaluate.gray(scene(number))
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    return tmp_path


def measured(root, models, cases, **options):
    settings = {"source": "clips", "frames": 3, "threads": 1, "strength": 1.0, "vmaf": False}
    return evaluate.evaluate(root, models, cases, **(settings | options))


def test_files_hold_the_frames_exactly(tmp_path):
    frames = [evaluate.gray(scene(i)) for i in range(3)]
    evaluate.write(tmp_path / "a.mkv", frames)
    read = evaluate.read(tmp_path / "a.mkv")
    assert [f.to_ndarray().tobytes() for f in read] == [f.to_ndarray().tobytes() for f in frames]


def test_the_figures_are_those_of_the_middle_of_the_last_odd_second(clips):
    report = measured(clips, {"nano-2x": MODELS / "nano-2x.onnx"}, ["clean"])["clean"]
    truth = [evaluate.gray(scene(3 * RATE + 3 + i)) for i in range(3)]
    expected = []
    for frame in truth:
        small = evaluate.resize(frame, Fraction(1, 2), Interpolation.BICUBIC)
        large = evaluate.resize(small, Fraction(2), Interpolation.LANCZOS)
        planes = [plane(f).astype(np.float32) for f in (frame, large)]
        expected.append(psnr(*planes))
    found = report["lanczos"]["waves"]
    assert found.psnr == pytest.approx(np.mean(expected))
    assert report["nano-2x"]["waves"].psnr > found.psnr
    assert report["nano-2x"]["waves"].ms > 0


def test_strength_reaches_the_model(clips):
    models = {"clean-1x-nano": MODELS / "clean-1x-nano.onnx"}
    off = measured(clips, models, ["same-noise10"], strength=0.0)["same-noise10"]
    on = measured(clips, models, ["same-noise10"])["same-noise10"]
    untouched = off["untouched"]["waves"].psnr
    assert untouched == pytest.approx(20 * np.log10(255 / 10), abs=0.5)
    assert off["clean-1x-nano"]["waves"].psnr == pytest.approx(untouched, abs=0.05)
    assert on["clean-1x-nano"]["waves"].psnr > untouched + 1


def test_earlier_scenes_leave_out_the_last_odd_second(clips):
    (earlier,) = evaluate.scenes(clips, "earlier", 4)
    assert (earlier.name, earlier.begin, len(earlier.frames)) == ("waves@1s", 13, 17)


def test_the_moves_over_a_photograph_move_and_repeat(tmp_path):
    from PIL import Image

    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).resize((1200, 800)).save(tmp_path / "valendas.png")
    first, again = (next(iter(evaluate.scenes(tmp_path, "photos", 4))) for _ in range(2))
    assert (first.frames[0].width, first.frames[0].height) == evaluate.PHOTO_SIZE
    assert len(first.frames) - first.begin == 4
    assert np.array_equal(first.frames[9].to_ndarray(), again.frames[9].to_ndarray())
    assert not np.array_equal(first.frames[0].to_ndarray(), first.frames[-1].to_ndarray())
