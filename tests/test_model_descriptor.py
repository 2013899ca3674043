"""What vidpipe finds out about a model file, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelgen
import numpy as np
import onnx
import pytest
from modelgen import Net
from onnx import TensorProto, helper

from vidpipe.errors import ModelError
from vidpipe.model import descriptor
from vidpipe.model.descriptor import builtin_models, describe, find_model
from vidpipe.model.probe import check

PEERS = Path(__file__).parents[2] / "shared" / "data" / "peers"
ALL = {"scale": "2", "channels": "luma", "range": "0..1", "multiple": "1", "overlap": "7"}


def metadata(**values: str) -> dict[str, str]:
    return {f"vidpipe.{k}": v for k, v in {**ALL, **values}.items()}


# -- found out ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_scale_channels_and_reach_come_from_the_graph(
    tmp_path: Path, scale: int, channels: int
) -> None:
    model = describe(modelgen.random_net(tmp_path / "net.onnx", scale, channels))
    assert model.name == "net"
    assert (model.scale, model.channels) == (scale, {1: "luma", 3: "rgb"}[channels])
    assert (model.multiple, model.range, model.size) == (1, "0..1", None)
    assert (model.layout, model.dtype, model.strength) == ("NCHW", np.float32, None)
    assert model.overlap is not None
    assert 6 <= model.overlap <= 8  # six 3x3 convolutions, and the phases of DepthToSpace
    assert len(model.sha256) == 64
    check(model)


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_a_size_multiple_is_found(tmp_path: Path, multiple: int) -> None:
    path = modelgen.random_net(tmp_path / "net.onnx", 2, depth=2, width=8, unshuffle=multiple)
    model = describe(path)
    assert (model.multiple, model.scale) == (multiple, 2)
    assert model.overlap is not None
    assert model.overlap >= 3 * multiple
    check(model)


def test_the_value_range_is_found(tmp_path: Path) -> None:
    eye = np.eye(3)[:, :, None, None]
    net = Net(3)
    net.conv(eye).add("Clip", net.constant(np.float32(0)), net.constant(np.float32(255)))
    # Centred on 128, as networks trained on 0..255 are: grey 0.5 comes back as something else.
    mid = net.constant(np.full((1, 1, 1, 1), 100, np.float32))
    net.add("Max", mid)
    assert describe(net.save(tmp_path / "codes.onnx")).range == "0..255"

    net = Net(3).conv(eye)
    net.add("Clip", net.constant(np.float32(0)), net.constant(np.float32(1)))
    assert describe(net.save(tmp_path / "unit.onnx")).range == "0..1"


def test_a_fixed_size_is_found(tmp_path: Path) -> None:
    path = modelgen.random_net(
        tmp_path / "net.onnx", 2, 3, shape=[1, 3, 48, 64], out_shape=[1, 3, 96, 128]
    )
    model = describe(path)
    assert (model.size, model.scale, model.multiple) == ((64, 48), 2, 1)
    check(model)


def test_half_precision_is_found(tmp_path: Path) -> None:
    path = Net(1, half=True).conv(np.ones((1, 1, 1, 1))).save(tmp_path / "half.onnx")
    model = describe(path)
    assert (model.dtype, model.scale, model.overlap) == (np.float16, 1, 0)
    check(model)


def test_channels_last_is_found(tmp_path: Path) -> None:
    net = Net(3).add("Transpose", perm=[0, 3, 1, 2]).conv(np.eye(3)[:, :, None, None])
    net.add("Transpose", perm=[0, 2, 3, 1])
    path = net.save(tmp_path / "last.onnx", shape=[1, "h", "w", 3], out_shape=[1, "h", "w", 3])
    model = describe(path)
    assert (model.layout, model.channels, model.scale) == ("NHWC", "rgb", 1)
    check(model)


def test_a_free_number_of_channels_is_found(tmp_path: Path) -> None:
    shape = ["n", "c", "h", "w"]
    path = Net(1).conv(np.ones((1, 1, 1, 1))).save(tmp_path / "free.onnx", shape=shape)
    assert describe(path).channels == "luma"
    path = Net(3).conv(np.eye(3)[:, :, None, None]).save(tmp_path / "free3.onnx", shape=shape)
    assert describe(path).channels == "rgb"


def test_a_strength_input_is_found(tmp_path: Path) -> None:
    model = describe(modelgen.strong(tmp_path / "strong.onnx"))
    assert (model.strength, model.scale) == ("strength", 1)
    check(model)


def test_a_model_that_looks_at_the_whole_picture_has_no_overlap(tmp_path: Path) -> None:
    net = Net(1)
    net.nodes.append(helper.make_node("GlobalAveragePool", ["input"], ["mean"]))
    net.add("Add", "mean")
    assert describe(net.save(tmp_path / "mean.onnx")).overlap is None


def test_reach_that_the_graph_hides_is_measured(tmp_path: Path) -> None:
    net = Net(1)
    shape = net.constant(np.array([0, 0, -1, 161], np.int64))
    net.add("Reshape", net.constant(np.array([1, 1, -1], np.int64)))
    net.add("Reshape", shape)
    net.conv(np.ones((1, 1, 7, 7)) / 49)
    path = net.save(tmp_path / "reshape.onnx", shape=[1, 1, 161, 161])
    model = describe(path)
    assert model.overlap is not None
    assert 3 <= model.overlap <= 6


@pytest.mark.skipif(not PEERS.is_dir(), reason="no foreign models here")
@pytest.mark.parametrize("name", ["websr-l-an", "animevideov3-x2"])
def test_foreign_models_are_taken(name: str) -> None:
    model = describe(PEERS / f"{name}.onnx")
    assert (model.scale, model.channels, model.range, model.multiple) == (2, "rgb", "0..1", 1)
    assert model.overlap in range(7, 24)
    check(model)


# -- said ---------------------------------------------------------------------------------


def test_metadata_that_says_all_is_taken_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"name": "Nano", "tier": "nano", "task": "upscale", "version": "1", "license": "CC0"}
    path = modelgen.random_net(
        tmp_path / "net.onnx", metadata=metadata(**texts, description="Small") | {"other": "x"}
    )
    monkeypatch.setattr("vidpipe.model.probe.Trial", None)
    model = describe(path)
    assert {k: getattr(model, k) for k in texts} == texts
    assert (model.description, model.overlap) == ("Small", 7)
    check_needs_a_run = pytest.raises(TypeError)
    with check_needs_a_run:
        check(model)


def test_a_toml_file_beside_the_model_wins(tmp_path: Path) -> None:
    path = modelgen.random_net(tmp_path / "net.onnx", 2, 3, metadata=metadata(channels="rgb"))
    (tmp_path / "model.toml").write_text('channels = "rgb"\nlicense = "folder"\n')
    assert describe(path).license == "folder"
    (tmp_path / "net.toml").write_text('channels = "bgr"\nrange = "0..255"\nmultiple = 4\n')
    model = describe(path)
    assert (model.channels, model.range, model.multiple) == ("bgr", "0..255", 4)
    assert model.license == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chanels = 'rgb'", "unknown key 'chanels'. Did you mean 'channels'"),
        ("scale = 5", "'scale' is 5, expected a whole number from 1 to 4"),
        ("scale = true", "'scale' is True, expected a whole number"),
        ("range = '0..2'", "'range' is '0..2', expected one of 0..1, 0..255"),
        ("name = 3", "'name' is 3, expected a text"),
        ("scale =", "is not a TOML file"),
        ("output = 'image'", "has no image output 'image'"),
        ("input = 'inptu'", "has no image input 'inptu'. Did you mean 'input'"),
        ("strength = 'sigma'", "has no input 'sigma'"),
        ("channels = 'luma'", "has 3 channel(s), but is said to be 'luma'"),
    ],
)
def test_false_keys_and_values_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = modelgen.identity(tmp_path / "net.onnx", 3)
    (tmp_path / "net.toml").write_text(text + "\n")
    with pytest.raises(ModelError) as caught:
        describe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"scale": "3"}, "claims scale 3, but has 2"),
        ({"multiple": "1", "unshuffle": "2"}, "does not run at"),
        ({"overlap": "2"}, "claims an overlap of 2 pixels, but looks"),
    ],
)
def test_false_claims_are_found(tmp_path: Path, claims: dict[str, Any], message: str) -> None:
    unshuffle = int(claims.pop("unshuffle", 1))
    path = modelgen.random_net(
        tmp_path / "net.onnx", unshuffle=unshuffle, metadata=metadata(**claims)
    )
    with pytest.raises(ModelError, match=message):
        check(describe(path))


def test_a_false_range_is_found(tmp_path: Path) -> None:
    net = Net(1).conv(np.ones((1, 1, 1, 1)))
    net.add("Clip", net.constant(np.float32(0)), net.constant(np.float32(1)))
    claims = metadata(scale="1", range="0..255", overlap="0")
    with pytest.raises(ModelError, match=r"claims range 0\.\.255, but takes 0\.\.1"):
        check(describe(net.save(tmp_path / "net.onnx", metadata=claims)))


# -- refused ------------------------------------------------------------------------------


def conv(channels: int, out: int, **options: Any) -> Net:
    return Net(channels).conv(np.ones((out, channels, 1, 1)), **options)


def image(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def two_images(path: Path) -> Path:
    net = Net(1)
    net.inputs.append(image("other", [1, 1, "height", "width"]))
    return net.add("Add", "other").save(path)


def odd_extra(path: Path) -> Path:
    net = Net(1)
    net.inputs.append(image("table", [16]))
    net.nodes.append(helper.make_node("ReduceMean", ["table"], ["mean"], keepdims=0))
    return net.add("Add", "mean").save(path)


def two_outputs(path: Path) -> Path:
    conv(1, 1).save(path)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Neg", ["output"], ["mask"]))
    model.graph.output.append(image("mask", [1, 1, "height", "width"]))
    onnx.save(model, path)
    return path


def integers(path: Path) -> Path:
    net = Net(1)
    net.add("Identity").save(path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(model, path)
    return path


REFUSED: dict[str, tuple[Any, str]] = {
    "text": (lambda p: p.write_text("not a model"), "is not an ONNX model"),
    "empty": (lambda p: p.write_bytes(b""), "is not an ONNX model"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "missing": (lambda p: None, "does not exist"),
    "two channels": (lambda p: conv(2, 2).save(p), "takes 2 channels; 1 (luma) and 3"),
    "four channels": (lambda p: conv(4, 4).save(p), "takes 4 channels"),
    "other channels out": (
        lambda p: conv(3, 1).save(p, out_shape=[1, 1, "h", "w"]),
        "makes 1 channels out of 3",
    ),
    "other channels out, found by a run": (
        lambda p: conv(3, 1).save(p, out_shape=["n", "c", "h", "w"]),
        "makes 1 channels out of 3",
    ),
    "two images": (two_images, "takes 2 images ('input', 'other')"),
    "unknown input": (odd_extra, "inputs beside the image that are not known: 'table' (16)"),
    "two outputs": (two_outputs, "has 2 outputs ('output', 'mask')"),
    "no image in": (
        lambda p: Net(1).add("Identity").save(p, shape=[1, 64], out_shape=[1, 64]),
        "takes no image: its inputs are input (1, 64)",
    ),
    "no image out": (
        lambda p: Net(1).add("Flatten").save(p, out_shape=[1, "n"]),
        "output 'output' (1, ?) is not an image",
    ),
    "integers": (integers, "input 'input' is not float32 or float16"),
    "batch": (
        lambda p: conv(1, 1).save(p, shape=[4, 1, "h", "w"]),
        "takes 4 pictures at a time",
    ),
    "one side fixed": (
        lambda p: conv(1, 1).save(p, shape=[1, 1, 64, "w"]),
        "fixes one side of its input",
    ),
    "scale 5": (lambda p: modelgen.nearest(p, 5), "whole scales from 1 to 4"),
    "half the size": (lambda p: conv(1, 1, strides=[2, 2]).save(p), "whole scales from 1 to 4"),
    "half the size, fixed": (
        lambda p: conv(1, 1, strides=[2, 2]).save(
            p, shape=[1, 1, 64, 64], out_shape=[1, 1, 32, 32]
        ),
        "makes 32x32 out of 64x64",
    ),
    "does not run": (
        lambda p: Net(1).conv(np.ones((1, 3, 1, 1))).save(p),
        "bad.onnx'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    path = tmp_path / "bad.onnx"
    make(path)
    with pytest.raises(ModelError) as caught:
        describe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


# -- by name ------------------------------------------------------------------------------


def test_built_in_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "MODELS", tmp_path)
    names = ["clean-1x-nano", "fast-2x", "nano-2x"]
    for name in names:
        modelgen.random_net(tmp_path / f"{name}.onnx", metadata=metadata(tier="nano"))
    assert [m.name for m in builtin_models()] == names
    assert find_model("nano-2x") == tmp_path / "nano-2x.onnx"
    assert find_model(tmp_path / "fast-2x.onnx") == tmp_path / "fast-2x.onnx"
    with pytest.raises(ModelError, match=r"no built-in model is called 'nano2x'.*'nano-2x'"):
        find_model("nano2x")
    with pytest.raises(ModelError, match=r"model file 'nano-2x\.onx' does not exist"):
        find_model("nano-2x.onx")
    with pytest.raises(ModelError, match="is a folder"):
        find_model(tmp_path)


def test_built_in_models_keep_their_promises() -> None:
    for model in builtin_models():
        check(model)
        assert model.path.stem == model.name
        assert model.scale == int(model.name.split("-")[1][0] if "1x" in model.name else 2)
        assert (model.channels, model.range) == ("luma", "0..1")
        assert model.license
        assert ("clean" in model.name) == (model.strength == "strength")
