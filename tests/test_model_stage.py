"""The model stage: its contract, its ring, precision, strength and report."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelgen
import numpy as np
import onnx
import pytest

from vidpipe.device import Device
from vidpipe.errors import DeviceError, MissingExtraError, ModelError, SpecError
from vidpipe.frame import Color, Frame, FrameSpec, Range, pixel_format
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import describe
from vidpipe.model.session import HostSession
from vidpipe.model.stage import Model, mean_change
from vidpipe.model.variant import variant
from vidpipe.providers import Target, provider
from vidpipe.providers.base import Found
from vidpipe.stage import options_of, stage_class
from vidpipe.testing import pattern, spec

Array = np.ndarray[Any, Any]
METADATA = {
    "vidpipe.scale": "2",
    "vidpipe.channels": "luma",
    "vidpipe.range": "0..1",
    "vidpipe.multiple": "1",
    "vidpipe.overlap": "7",
}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return modelgen.random_net(tmp_path / "net.onnx", width=8, depth=2, metadata=METADATA)


def opened(path: Path, given: FrameSpec, **options: Any) -> Model:
    stage = Model(model=str(path), threads=1, **options)
    stage.plan(given)
    stage.open()
    return stage


def process(stage: Model, frame: Frame) -> Frame:
    (result,) = stage.process(frame)
    return result


def test_it_is_registered_with_its_options() -> None:
    assert stage_class("model") is Model
    assert options_of(Model) == {
        "model": (str, True),
        "strength": (float | None, False),
        "device": (str, False),
        "prefer": (str, False),
        "allow_cpu_nodes": (bool, False),
        "precision": (str, False),
        "wait_compile": (bool, False),
        "chosen": (str, False),
        "threads": (int, False),
        "tile": (str, False),
        "memory_limit": (str | None, False),
    }


def test_plan_is_pure_and_keeps_all_but_the_size(net: Path) -> None:
    stage = Model(model=str(net))
    given = spec(64, 48, "yuv422p10le")
    out = stage.plan(given)
    assert (out.width, out.height) == (128, 96)
    assert (out.format, out.color) == (given.format, given.color)
    assert (out.time_base, out.rate, out.device) == (given.time_base, given.rate, given.device)
    assert stage.plan(given) == out
    assert stage.plan(spec(10, 10)).width == 20
    stage.close()
    assert stage.report()["frames"] == 0


def test_frames_keep_their_time_and_are_never_written_to(net: Path) -> None:
    given = spec()
    stage = opened(net, given)
    frame = pattern(given, 5)
    before = [p.copy() for p in frame.planes]
    result = process(stage, frame)
    assert (result.pts, result.duration, result.ready) == (5, 1, None)
    assert result.spec == stage.plan(given)
    assert result.slot is not None
    for a, b in zip(frame.planes, before, strict=True):
        np.testing.assert_array_equal(a, b)
    stage.close()


def test_results_depend_on_the_frame_alone(net: Path) -> None:
    given = spec()
    stage = opened(net, given)
    kept = [process(stage, pattern(given, i)) for i in range(6)]  # more than the ring holds
    for i in (5, 0, 3):
        again = process(stage, pattern(given, i))
        for a, b in zip(again.planes, kept[i].planes, strict=True):
            np.testing.assert_array_equal(a, b)
    stage.close()
    for frame in kept:  # the planes outlive the stage
        assert frame.planes[0].shape == (96, 128)


def test_slots_are_used_again_and_the_ring_does_not_grow(net: Path) -> None:
    given = spec()
    stage = opened(net, given)
    addresses = set()
    for i in range(50):
        result = process(stage, pattern(given, i))
        addresses.add(result.planes[0].ctypes.data)
        del result
    assert len(addresses) <= stage.ring_depth
    stage.close()
    assert stage.report()["ring_grown"] == 0


def test_memory_does_not_grow_with_frames(net: Path) -> None:
    import psutil

    given = spec(320, 180)
    stage = opened(net, given)
    frame = pattern(given)
    for _ in range(20):
        process(stage, frame)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(200):
        process(stage, frame)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 8 << 20
    stage.close()


@pytest.mark.parametrize("name", ["yuv420p", "p010le"])
def test_planes_with_wide_rows_are_read_right(net: Path, name: str) -> None:
    given = spec(50, 30, name)
    stage = opened(net, given)
    frame = pattern(given)
    wide = []
    for plane in frame.planes:
        memory = np.full((plane.shape[0], 64, *plane.shape[2:]), 9, plane.dtype)
        memory[:, : plane.shape[1]] = plane
        wide.append(memory[:, : plane.shape[1]])
    expected = process(stage, frame)
    got = process(stage, frame.replace(wide, given))
    for a, b in zip(got.planes, expected.planes, strict=True):
        np.testing.assert_array_equal(a, b)
    stage.close()


def test_another_size_is_planned_anew(net: Path) -> None:
    first, second = spec(64, 48), spec(37, 51)
    stage = opened(net, first)
    process(stage, pattern(first))
    out = stage.replan(second)
    assert (out.width, out.height) == (74, 102)
    got = process(stage, pattern(second))
    assert got.planes[0].shape == (102, 74)
    fresh = opened(net, second)
    for a, b in zip(got.planes, process(fresh, pattern(second)).planes, strict=True):
        np.testing.assert_array_equal(a, b)
    fresh.close()
    stage.close()
    stage.close()
    assert stage.report()["frames"] == 2


def test_close_before_open_and_after_an_error_is_safe(net: Path) -> None:
    stage = Model(model=str(net))
    stage.close()
    stage = Model(model="no-such-model")
    with pytest.raises(ModelError):
        stage.plan(spec())
    stage.close()
    assert stage.report()["model"] == "no-such-model"


def test_the_report_says_what_ran(net: Path) -> None:
    stage = opened(net, spec(), device="cpu")
    for i in range(3):
        process(stage, pattern(spec(), i))
    stage.close()
    report = stage.report()
    assert (report["model"], report["scale"], report["frames"]) == ("net", 2, 3)
    assert (report["device"], report["threads"], report["tiles"]) == ("cpu", 1, None)
    assert list(report["nodes"]) == ["CPUExecutionProvider"]
    assert report["nodes"]["CPUExecutionProvider"] > 5
    assert 0 < report["mean_change"] < 64


@pytest.mark.parametrize("name", ["yuv420p", "yuv420p10le", "p010le"])
def test_mean_change_is_measured_in_8_bit_codes(tmp_path: Path, name: str) -> None:
    same = modelgen.nearest(tmp_path / "same.onnx", 2, metadata=METADATA)
    given = spec(64, 48, name)
    frame = pattern(given)
    stage = opened(same, given)
    result = process(stage, frame)
    assert mean_change(frame.planes[0], result.planes[0], result.spec) == 0
    quarter = (result.planes[0] // 4) * 3
    shift = 1 << (given.format.bits - 8 + given.format.shift)
    expected = np.abs(
        quarter.astype(float)[::2, ::2][::8] - frame.planes[0].astype(float)[::8]
    ).mean()
    got = mean_change(frame.planes[0], quarter, result.spec)
    assert got == pytest.approx(expected / shift)
    stage.close()


# -- kinds of models ----------------------------------------------------------------------


def luma(path: Path, width: int = 40, height: int = 24, **options: Any) -> Array:
    given = spec(width, height, "gray")
    stage = opened(path, given, **options)
    planes: Array = process(stage, pattern(given, 1)).planes[0].copy()
    stage.close()
    return planes


def test_half_precision_models_run(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 0.1, (1, 1, 3, 3))
    half = modelgen.Net(1, half=True).conv(weights).add("Relu").save(tmp_path / "half.onnx")
    single = modelgen.Net(1).conv(weights).add("Relu").save(tmp_path / "single.onnx")
    assert np.abs(luma(half).astype(int) - luma(single)).max() <= 1
    # Unless it is widened, its nodes stay half and the border is cast.
    given = spec(40, 24, "gray")
    compiled = compile_model(describe(half), given, widen=False)
    assert [n.op_type for n in compiled.proto.graph.node].count("Cast") == 3
    out = np.empty((24, 40), np.uint8)
    session = HostSession(compiled)
    session.bind(0, [out])
    session.run(0, pattern(given, 1).planes)
    assert np.abs(out.astype(int) - luma(single)).max() <= 1


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 18, 21])
def test_old_and_new_operator_sets_run(tmp_path: Path, opset: int) -> None:
    net = modelgen.Net(1, opset=opset).conv(np.ones((4, 1, 1, 1))).add("Relu")
    path = net.add("DepthToSpace", blocksize=2).save(tmp_path / "net.onnx")
    given = spec(40, 24, "gray")
    stage = opened(path, given)
    frame = pattern(given, 1)
    result = process(stage, frame).planes[0]
    expected = np.maximum(frame.planes[0], 16).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(result, expected)
    stage.close()


def test_channels_last_and_bgr_models_run(tmp_path: Path) -> None:
    mix = np.array([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.2, 0.0, 0.8]])
    rgb = modelgen.Net(3).conv(mix[:, :, None, None]).save(tmp_path / "rgb.onnx")
    net = modelgen.Net(3).add("Transpose", perm=[0, 3, 1, 2]).conv(mix[:, :, None, None])
    last = net.add("Transpose", perm=[0, 2, 3, 1]).save(
        tmp_path / "last.onnx", shape=[1, "h", "w", 3], out_shape=[1, "h", "w", 3]
    )
    back = modelgen.Net(3).conv(mix[::-1, ::-1, None, None]).save(tmp_path / "bgr.onnx")
    (tmp_path / "bgr.toml").write_text('channels = "bgr"')
    given = spec(40, 24)
    results = []
    for path in (rgb, last, back):
        stage = opened(path, given)
        results.append(process(stage, pattern(given)).planes)
        stage.close()
    for planes in results[1:]:
        for a, b in zip(planes, results[0], strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1


def test_models_of_0_to_255_run(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 0.2, (3, 3, 3, 3))
    bias = np.array([0.1, 0.2, 0.3])
    unit = modelgen.Net(3).conv(weights, bias).save(tmp_path / "unit.onnx")
    codes = modelgen.Net(3).conv(weights, bias * 255).save(tmp_path / "codes.onnx")
    (tmp_path / "codes.toml").write_text('range = "0..255"')
    given = spec(40, 24)
    got = []
    for path in (unit, codes):
        stage = opened(path, given)
        got.append(process(stage, pattern(given)).planes)
        stage.close()
    for a, b in zip(*got, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


def test_strength_may_change_while_running(tmp_path: Path) -> None:
    path = modelgen.strong(tmp_path / "strong.onnx", gain=20 / 219)
    given = spec(40, 24, "gray")
    frame = pattern(given)
    y = frame.planes[0].astype(int)
    stage = opened(path, given)
    np.testing.assert_array_equal(process(stage, frame).planes[0], np.clip(y + 20, 0, 255))
    stage.set_strength(0.5)
    np.testing.assert_array_equal(process(stage, frame).planes[0], np.clip(y + 10, 0, 255))
    assert stage.report()["strength"] == 0.5
    stage.close()
    stage = opened(path, given, strength=0.0)
    np.testing.assert_array_equal(process(stage, frame).planes[0], y)
    stage.close()


def test_strength_of_a_model_without_one_is_refused(net: Path) -> None:
    with pytest.raises(ModelError, match="has no strength input"):
        Model(model=str(net), strength=0.5).plan(spec())
    with pytest.raises(ModelError, match="has no strength input"):
        Model(model=str(net)).set_strength(0.5)


def test_a_final_depth_to_space_is_done_on_code_values(tmp_path: Path) -> None:
    path = modelgen.random_net(tmp_path / "net.onnx", width=8, depth=1)
    compiled = compile_model(describe(path), spec())
    assert "DepthToSpace" not in [n.op_type for n in compiled.proto.graph.node]


def test_models_with_functions_of_their_own_run(tmp_path: Path) -> None:
    path = modelgen.Net(1).add("Double", domain="own").save(tmp_path / "net.onnx")
    model = onnx.load(path)
    body = [onnx.helper.make_node("Add", ["x", "x"], ["y"])]
    opsets = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("own", "Double", ["x"], ["y"], body, opsets))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save(model, path)
    given = spec(40, 24, "gray")
    y = pattern(given, 1).planes[0].astype(int)
    np.testing.assert_array_equal(luma(path), np.clip(2 * (y - 16) + 16, 0, 255))


def test_no_quantiser_is_put_behind_a_quantised_model(tmp_path: Path) -> None:
    # ONNX Runtime would take the float convolution between them to be meant in int8.
    weights = np.random.default_rng(2).normal(0, 0.1, (1, 1, 3, 3))
    net = modelgen.Net(1)
    step, zero = net.constant(np.float32(1 / 255)), net.constant(np.uint8(0))
    net.add("QuantizeLinear", step, zero).add("DequantizeLinear", step, zero).conv(weights)
    path = net.save(tmp_path / "net.onnx")
    given = replace(spec(40, 24, "gray"), color=Color(range=Range.FULL))
    compiled = compile_model(describe(path), given)
    assert [n.op_type for n in compiled.proto.graph.node].count("QuantizeLinear") == 1
    stage = opened(path, given)
    frame = pattern(given)
    padded = np.pad(frame.planes[0].astype(float), 1)
    value = sum(
        weights[0, 0, i, j] * padded[i : i + 24, j : j + 40] for i in range(3) for j in range(3)
    )
    got = process(stage, frame).planes[0]
    assert np.abs(got - np.clip(value, 0, 255)).max() <= 0.51
    stage.close()


# -- precision ----------------------------------------------------------------------------


def test_int8_runs_the_copy_and_says_so() -> None:
    given = spec(64, 48)
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8) + 60
    frame = pattern(given)
    frame = frame.replace((ramp, *frame.planes[1:]), given)  # noise is not what it is meant for
    stage = opened("nano-2x", given, precision="int8")  # type: ignore[arg-type]
    got = process(stage, frame).planes[0].copy()
    stage.close()
    assert stage.report()["precision"] == "int8"
    assert stage.report()["model"] == "nano-2x"
    assert "in int8" in stage.report()["summary"]
    stage = opened("nano-2x", given)  # type: ignore[arg-type]
    plain = process(stage, frame).planes[0]
    assert stage.report()["precision"] == "fp32"
    assert 0 < np.abs(got.astype(int) - plain).max() <= 4
    stage.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, ModelError, "no copy in int8.*vidpipe models quantize"),
        ({"precision": "fp16"}, ModelError, "the CPU computes float16 models in float32"),
        ({"precision": "fp8"}, SpecError, "fp8 runs on TensorRT for RTX only.*--device rtx"),
        ({"precision": "int4"}, SpecError, "'int4' is not known"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_before_anything_runs(
    net: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Model(model=str(net), **options).plan(spec())
    assert "\n" not in str(caught.value)


def test_fp8_on_rtx_needs_a_copy_that_holds_such_values(net: Path) -> None:
    """Up to the device; none has run it."""
    model = describe(net)
    with pytest.raises(ModelError, match=r"no copy in fp8.*Model Optimizer"):
        variant(model, "fp8", on_cpu=False, provider="rtx")
    copy = onnx.load(net)
    path = net.with_name("net-fp8.onnx")
    onnx.save(copy, path)
    with pytest.raises(ModelError, match="has no fp8 values in it"):
        variant(model, "fp8", on_cpu=False, provider="rtx")
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0])
    copy.graph.initializer.append(zero)
    onnx.save(copy, path)
    found = variant(model, "fp8", on_cpu=False, provider="rtx")
    assert (found.model.path, found.half, found.precision) == (path, False, "fp8")


@pytest.mark.parametrize(
    ("device", "precision", "half"),
    [
        ("cuda", "auto", True),
        ("cuda", "fp32", False),
        ("cuda", "fp16", True),
        ("rtx", "int8", True),  # CUDA has no convolutions in int8
    ],
)
def test_on_a_gpu_the_precision_reaches_the_graph_and_the_kernels(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, half: bool
) -> None:
    class Seen(Exception):
        pass

    seen: dict[str, Any] = {}
    compiled: list[bool] = []

    def gpu_session(model: Any, graph: Any, **options: Any) -> Any:
        seen.update(options, model=model)
        raise Seen

    def compile_(*given: Any, **options: Any) -> Any:
        compiled.append(options["half"])
        return compile_model(*given, **options)

    monkeypatch.setattr("vidpipe.model.kernels.gpu_session", gpu_session)
    monkeypatch.setattr("vidpipe.model.stage.compile_model", compile_)
    on_gpu = Found(provider(device), provider(device).ep)
    monkeypatch.setattr(Target, "find", lambda self, prefer="speed": on_gpu)
    monkeypatch.setattr("vidpipe.model.stage.Ring", lambda *_: SimpleNamespace(slots=[], grown=0))
    monkeypatch.setattr("vidpipe.model.stage.new_stream", lambda device: None)
    monkeypatch.setattr(
        "vidpipe.model.stage.import_cupy", lambda device: SimpleNamespace(asarray=np.asarray)
    )
    stage = Model(model="nano-2x", device=device, precision=precision, memory_limit="1G")
    stage.plan(replace(spec(64, 48), device=Device("cuda")))
    with pytest.raises(Seen):
        stage.open()
    assert (seen["half"], compiled) == (half, [half])
    assert (seen["model"].precision == "int8") == (precision == "int8")
    stage.close()


# -- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, DeviceError, "device 'tpu' is not known"),
        ({"threads": -1}, SpecError, "threads is -1"),
        ({"strength": float("nan")}, SpecError, "strength is nan"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Model(model="any", **options)


def test_a_model_that_breaks_its_promise_is_refused_in_one_line(tmp_path: Path) -> None:
    path = modelgen.nearest(tmp_path / "net.onnx", 3, metadata={**METADATA, "vidpipe.scale": "2"})
    with pytest.raises(ModelError) as caught:
        process(opened(path, spec()), pattern(spec()))
    assert "\n" not in str(caught.value)


def test_a_missing_onnxruntime_names_its_extra(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    stage = Model(model=str(net))
    stage.plan(spec())
    with pytest.raises(MissingExtraError, match=r"pip install 'vidpipe\[cpu\]'"):
        stage.open()
    stage.close()


def test_light_imports_stay_light() -> None:
    code = (
        "import sys, vidpipe, vidpipe.stage, vidpipe.model; "
        "heavy = {'onnx', 'onnxruntime'} & set(sys.modules); assert not heavy, heavy; "
        "import vidpipe.model.stage; assert 'onnxruntime' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rgb_formats_keep_their_planes_in_order(tmp_path: Path) -> None:
    path = modelgen.nearest(tmp_path / "net.onnx", 2, 3)
    given = FrameSpec(width=16, height=8, format=pixel_format("gbrp"))
    stage = opened(path, given)
    frame = pattern(given)
    for before, after in zip(frame.planes, process(stage, frame).planes, strict=True):
        np.testing.assert_array_equal(after[::2, ::2], before)
    stage.close()
