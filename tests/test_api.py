"""The library."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import vidpipe
from vidpipe.api import build_graph, model_chain
from vidpipe.errors import GraphError, InputError, SpecError
from vidpipe.testing import pattern, spec

pytestmark = pytest.mark.usefixtures("no_leaks")
SAMPLES = Path(__file__).parent.parent / "samples"


def chain(**options: object) -> list[str]:
    return [str(o.get("model", o["use"])) for o in model_chain(**options)]  # type: ignore[arg-type]


def test_model_chain() -> None:
    assert chain() == chain(device="cpu") == chain(device="auto") == ["clean-2x-nano"]
    assert chain(device="cuda:0") == ["clean-2x-fast"]
    assert chain(quality="quality") == ["clean-2x-quality"]
    assert chain(denoise=0.5, quality="fast", scale=1) == ["clean-1x-fast"]
    assert chain(scale=1, quality="quality") == ["clean-1x-fast"]
    assert chain(scale=4) == ["clean-2x-nano", "nano-2x"]
    assert chain(scale=3) == ["clean-2x-nano", "nano-2x", "resize"]
    assert chain(scale=1.5) == ["clean-2x-nano", "resize"]
    assert chain(model="clean-1x-nano", scale=2) == ["clean-1x-nano", "nano-2x"]
    assert chain(model="nano-2x", scale=4) == ["nano-2x", "nano-2x"]
    assert model_chain(denoise=0.5)[0]["strength"] == 0.5
    with pytest.raises(InputError, match="no strength"):
        model_chain(model="nano-2x", denoise=0.5)
    with pytest.raises(InputError, match="quality is 'best'"):
        model_chain(quality="best")
    with pytest.raises(InputError, match="1 to 16"):
        model_chain(scale=float("nan"))


def test_build_graph_fills_the_open_ends() -> None:
    graph = build_graph("in.mp4", "out.mp4", crf=20.0, overrides=["model.tile=off"])
    assert graph.nodes["source"].options["path"] == "in.mp4"
    assert graph.nodes["sink"].options == {"path": "out.mp4", "crf": 20.0}
    assert graph.nodes["model"].options["tile"] == "off"
    assert build_graph("i", "o.mp4", threads=2).nodes["source"].options["threads"] == 2
    with pytest.raises(GraphError, match=r"an option 'cfr'\. Did you mean 'crf'"):
        build_graph("in.mp4", "out.mp4", cfr=20)
    with pytest.raises(GraphError, match="several encode stages"):
        build_graph("in.mp4", "out.mp4", graph="archive-and-share")
    with pytest.raises(GraphError, match="2 model stages"):
        build_graph("in.mp4", "out.mp4", graph="upscale-4x", model="nano-2x")
    with pytest.raises(GraphError, match="do not go together"):
        build_graph("in.mp4", "out.mp4", graph="upscale-2x", scale=2)


def test_enhance_calls_progress_and_reports(sample: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    report = vidpipe.enhance(
        sample,
        tmp_path / "o.mkv",
        duration_s=2.0,
        progress=lambda pipeline: seen.append(pipeline.written()),
    )
    assert report.problems == []
    assert report.stage("sink").frames_in == 50
    assert seen
    assert seen == sorted(seen)


def test_an_error_in_progress_stops_the_run(sample: Path, tmp_path: Path) -> None:
    def stop(_: vidpipe.Pipeline) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        vidpipe.enhance(sample, tmp_path / "o.mkv", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_frames_in_and_frames_out(sample: Path) -> None:
    given = list(vidpipe.read(sample, duration_s=0.4))
    got = list(vidpipe.stream(given))
    assert [f.pts for f in got] == [f.pts for f in given]
    assert (got[0].spec.width, got[0].spec.height) == (1280, 720)
    again = list(vidpipe.stream(iter(given)))
    for one, two in zip(got, again, strict=True):
        for a, b in zip(one.planes, two.planes, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_stream_may_be_left_early_and_is_lazy() -> None:
    taken = 0
    first = spec(32, 32)

    def frames():
        nonlocal taken
        for pts in range(1000):
            taken += 1
            yield pattern(first, pts)

    stream = vidpipe.stream(frames())
    assert next(stream).pts == 0
    stream.close()
    assert taken < 20
    assert list(vidpipe.stream([])) == []


def test_an_error_of_the_iterator_comes_out() -> None:
    def frames():
        yield pattern(spec(32, 32), 0)
        raise vidpipe.VidpipeError("camera unplugged")

    with pytest.raises(vidpipe.VidpipeError, match="camera unplugged"):
        list(vidpipe.stream(frames()))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(24, 32), (24, 32, 3), (3, 24, 32), (24, 32, 1), (1, 24, 32)])
def test_an_array_comes_back_as_the_same_kind(dtype: type, shape: tuple[int, ...]) -> None:
    full = 1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    picture = np.full(shape, 0.25 * full).astype(dtype)
    with vidpipe.Enhancer("nano-2x") as enhancer:
        large = enhancer(picture)
    assert isinstance(large, np.ndarray)
    assert large.dtype == dtype
    assert large.shape == tuple(s if s in (1, 3) else 2 * s for s in shape)
    np.testing.assert_allclose(large.astype(float), float(picture.flat[0]), atol=full * 0.01)


def test_channels_keep_their_order_and_place() -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, :24, 0] = 200
    picture[16:, :, 2] = 100
    with vidpipe.Enhancer() as enhancer:
        large = enhancer(picture).astype(int)
        small = np.moveaxis(enhancer(np.moveaxis(picture, 2, 0)), 0, 2).astype(int)
    np.testing.assert_array_equal(large, small)
    flat = large.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
    inner = np.s_[4:12, 4:20]
    np.testing.assert_allclose(flat[inner], picture[inner], atol=4)
    np.testing.assert_allclose(flat[20:28, 30:44], picture[20:28, 30:44], atol=4)


def test_an_enhancer_takes_other_sizes_and_dlpack() -> None:
    class Tensor:
        """A foreign array: nothing but DLPack."""

        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack__(self, **options: object):
            return self.array.__dlpack__(**options)  # type: ignore[arg-type]

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    Tensor.__module__ = "foreign_arrays"
    module = type(sys)("foreign_arrays")
    module.from_dlpack = lambda array: Tensor(np.from_dlpack(array))  # type: ignore[attr-defined]
    sys.modules["foreign_arrays"] = module
    try:
        with vidpipe.Enhancer() as enhancer:
            for size in ((32, 32), (48, 64), (33, 31)):
                array = np.full(size, 77, np.uint8)
                large = enhancer(Tensor(array))
                assert isinstance(large, Tensor)
                np.testing.assert_array_equal(large.array, enhancer(array))
                assert large.array.shape == (2 * size[0], 2 * size[1])
    finally:
        del sys.modules["foreign_arrays"]


def test_pictures_that_are_not_supported() -> None:
    with vidpipe.Enhancer() as enhancer:
        for picture, words in (
            (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
            (np.zeros((8, 8), np.int32), "dtype int32"),
            ([[1, 2]], "type list"),
        ):
            with pytest.raises(SpecError, match=words):
                enhancer(picture)


def run_sample(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SAMPLES / name), run_name="__main__")


def test_samples(
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import av

    short = tmp_path / "short.mkv"
    vidpipe.enhance(sample, short, graph="upscale-2x", duration_s=0.2, model="nano-2x")
    run_sample("enhance_file.py", str(short), str(tmp_path / "a.mp4"), monkeypatch=monkeypatch)
    run_sample("enhance_frames.py", str(short), monkeypatch=monkeypatch)
    run_sample("enhance_array.py", monkeypatch=monkeypatch)
    run_sample("custom_stage.py", str(short), str(tmp_path / "b.mkv"), monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "5 frames mirrored" in printed
    assert "2560x1440" in printed
    assert "problem" not in printed
    frames = []
    for path in (short, tmp_path / "b.mkv"):
        with av.open(str(path)) as container:
            frames.append(next(container.decode(video=0)).to_ndarray()[:720].astype(float))
    assert abs(frames[0] - frames[1][:, ::-1]).mean() < 1
    assert abs(frames[0] - frames[1]).mean() > 10
