"""The shipped model files keep what their metadata promise."""

from pathlib import Path

import av
import numpy as np
import onnx
import onnxruntime
import pytest
from av.video.reformatter import Interpolation

FOLDER = Path(__file__).parent.parent / "vidpipe" / "models"
CLIP = Path(__file__).parent.parent / "samples" / "bigbuckbunny.mp4"

# name: scale, tier, task, most bytes, least PSNR gain in dB on CLIP (over Lanczos, or over
# the untouched noisy frames at scale 1).
MODELS = {
    "nano-2x": (2, "nano", "upscale", 160_000, 1.4),
    "fast-2x": (2, "fast", "upscale", 1_000_000, 1.8),
    "quality-2x": (2, "quality", "upscale", 5_000_000, 2.05),
    "clean-2x-nano": (2, "nano", "clean", 160_000, 0.7),
    "clean-2x-fast": (2, "fast", "clean", 1_000_000, 1.4),
    "clean-2x-quality": (2, "quality", "clean", 5_000_000, 1.7),
    "clean-1x-nano": (1, "nano", "clean", 160_000, 5.5),
    "clean-1x-fast": (1, "fast", "clean", 1_000_000, 6.4),
}
OPERATORS = {"Pad", "SpaceToDepth", "Conv", "Relu", "LeakyRelu", "Add", "Mul", "DepthToSpace"}


def network(name):
    """A function from limited-range codes (H, W), float, to such codes, unrounded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        FOLDER / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def run(codes, strength=1.0):
        feed = {"input": ((np.asarray(codes, np.float32) - 16) / 219)[None, None]}
        if "strength" in names:
            feed["strength"] = np.array([strength], np.float32)
        (out,) = session.run(["output"], feed)
        assert out.dtype == np.float32
        assert out.shape[:2] == (1, 1)
        return out[0, 0] * 219 + 16

    return run


def frames(count=2):
    with av.open(str(CLIP)) as container:
        decoded = list(container.decode(video=0))
    return decoded[len(decoded) // 2 :][:count]


def luma(frame):
    plane = frame.planes[0]
    stored = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return stored[: frame.height, : frame.width].astype(np.float32)


def scaled(frame, factor, method):
    return frame.reformat(
        width=int(frame.width * factor), height=int(frame.height * factor), interpolation=method
    )


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a - np.clip(np.rint(b), 0, 255)) ** 2))


def test_the_family_is_complete():
    assert {path.stem for path in FOLDER.glob("*.onnx")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_metadata_and_graph(name):
    scale, tier, task, most_bytes, _ = MODELS[name]
    path = FOLDER / f"{name}.onnx"
    assert path.stat().st_size <= most_bytes
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.pop("vidpipe.description")
    assert int(metadata.pop("vidpipe.overlap")) % 2 == 0
    assert metadata.pop("vidpipe.version").count(".") == 2
    assert metadata == {
        "vidpipe.name": name,
        "vidpipe.scale": str(scale),
        "vidpipe.channels": "luma",
        "vidpipe.range": "0..1",
        "vidpipe.multiple": "2",
        "vidpipe.tier": tier,
        "vidpipe.task": task,
        "vidpipe.license": "Apache-2.0",
    }
    assert model.ir_version <= 10
    assert 17 <= model.opset_import[0].version <= 19
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == [1, 1, "height", "width"]
    inputs = [entry.name for entry in model.graph.input]
    assert inputs == ["input", "strength"] if task == "clean" else ["input"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(16, 16), (18, 50), (34, 22)])
def test_sizes(name, size):
    scale = MODELS[name][0]
    out = network(name)(np.full(size, 100))
    assert out.shape == (size[0] * scale, size[1] * scale)


@pytest.mark.parametrize("name", MODELS)
def test_flat_and_extreme_pictures_stay_sane(name):
    run = network(name)
    for level in (0, 16, 128, 235, 255):
        out = run(np.full((32, 48), level))
        assert np.abs(out - level).max() < 4, f"a flat picture of {level} came out otherwise"
    rng = np.random.default_rng(0)
    for picture in (rng.integers(0, 256, (64, 64)), rng.choice([0, 255], (64, 64))):
        out = run(picture)
        assert np.isfinite(out).all()
        assert out.min() > -510
        assert out.max() < 765


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("clean-1x")])
def test_strength_zero_leaves_the_picture_alone(name):
    codes = np.random.default_rng(1).integers(0, 256, (48, 64)).astype(np.float32)
    assert np.abs(network(name)(codes, strength=0) - codes).max() < 0.01


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("clean-2x")])
def test_strength_zero_is_the_cubic_enlargement(name):
    frame = scaled(frames(1)[0], 0.5, Interpolation.BICUBIC)
    cubic = luma(scaled(frame, 2, Interpolation.BICUBIC))
    out = network(name)(luma(frame), strength=0)
    # FFmpeg rounds between its two passes.
    assert np.abs(np.rint(out) - cubic)[8:-8, 8:-8].max() <= 2


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("clean")])
def test_strength_blends(name):
    codes = luma(frames(1)[0])[:64, :96]
    run = network(name)
    half = (run(codes, strength=0) + run(codes, strength=1)) / 2
    assert np.abs(run(codes, strength=0.5) - half).max() < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_overlap_is_enough_for_tiles(name):
    """A pixel farther from the cut than `overlap` does not see it."""
    scale = MODELS[name][0]
    model = onnx.load(FOLDER / f"{name}.onnx")
    overlap = int({e.key: e.value for e in model.metadata_props}["vidpipe.overlap"])
    codes = luma(frames(1)[0])[100 : 100 + 2 * overlap + 4, :160]
    run = network(name)
    whole, part = run(codes), run(codes[: -(overlap // 2 * 2)])
    rows = part.shape[0] - overlap * scale
    assert rows > 0
    assert np.abs(whole[:rows] - part[:rows]).max() < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_quality_floor(name):
    scale, *_, floor = MODELS[name]
    run = network(name)
    gains = []
    for number, frame in enumerate(frames()):
        truth = luma(frame)
        if scale == 2:
            small = scaled(frame, 0.5, Interpolation.BICUBIC)
            before, after = luma(scaled(small, 2, Interpolation.LANCZOS)), run(luma(small))
        else:
            noise = np.random.default_rng(number).normal(0, 10, truth.shape)
            before = np.clip(np.rint(truth + noise), 0, 255)
            after = run(before)
        gains.append(psnr(truth, after) - psnr(truth, before))
    assert np.mean(gains) >= floor
