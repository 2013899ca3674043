"""Models in int8 and float16: what runs, how close it comes, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.modelgen import Net, nearest, random_net
from vidpipe.errors import ModelError, OutputError, SpecError
from vidpipe.frame import Frame
from vidpipe.model import ptq, quantize
from vidpipe.model.cache import Cache
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import Descriptor, builtin_models, describe, find_model
from vidpipe.model.quantize import FLOORS, Verdict, convert, pick
from vidpipe.model.session import HostSession, import_onnxruntime
from vidpipe.model.variant import PRECISIONS, converted_path, int8_copy, variant
from vidpipe.testing import spec

SPEC = spec(96, 64)
INT8 = sorted((Path(quantize.__file__).parent.parent / "models" / "int8").glob("*.onnx"))


def picture(number: int, name: str = "yuv420p", width: int = 96, height: int = 64) -> Frame:
    """Shapes, gradients and a little noise that move with the number."""
    made = spec(width, height, name)
    random = np.random.default_rng(number)
    planes = []
    for shape in made.plane_shapes():
        y, x = np.mgrid[: shape[0], : shape[1]]
        wave = np.sin((x + 3 * number) / 5) * np.cos(y / 7) + ((x // 16 + y // 12) % 2) - 0.5
        value = np.clip(126 + 55 * wave + random.normal(0, 2, wave.shape), 16, 235)
        value = value[..., None].repeat(2, 2) if len(shape) == 3 else value
        codes = np.rint(value * (1 << (made.format.bits - 8))).astype(made.format.dtype)
        planes.append(codes << made.format.shift)
    return Frame(tuple(planes), made, number)


SEEN, HELD_OUT = [picture(n) for n in range(6)], [picture(n) for n in (20, 21)]


def leaky_net(path: Path, *, residual: bool = False, prelu: bool = False) -> Path:
    """A network of the nano tier's kind, with an enlargement beside it that must stay exact."""
    random = np.random.default_rng(3)
    net = Net(1)
    net.add("SpaceToDepth", blocksize=2)
    split = net.value
    sizes = [4, 16, 16, 16]
    for a, b in itertools.pairwise(sizes):
        before = net.value
        net.conv(random.normal(0, (1.6 / (9 * a)) ** 0.5, (b, a, 3, 3)), random.normal(0, 0.05, b))
        if prelu:
            net.add("PRelu", net.constant(np.full((b, 1, 1), 0.1, np.float32)))
        else:
            net.add("LeakyRelu", alpha=0.1)
        if residual and a == b:
            net.add("Add", before)
    net.conv(0.05 * random.normal(0, (1 / 144) ** 0.5, (16, 16, 3, 3)), random.normal(0, 0.01, 16))
    correction, net.value = net.value, split
    repeat = np.zeros((4, 4, 2, 2))
    for y, x in np.ndindex(4, 4):
        repeat[y, x, y // 2, x // 2] = 1
    net.conv(repeat.reshape(16, 4, 1, 1)).add("Add", correction)
    return net.add("DepthToSpace", blocksize=4).save(path)


def operators(model: Descriptor) -> list[str]:
    """The operators that ONNX Runtime's CPU provider runs for the compiled graph."""
    session = HostSession(compile_model(model, SPEC), threads=1)
    parts = session._session.get_provider_graph_assignment_info()
    return [node.op_type for part in parts for node in part.get_nodes()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Descriptor, Verdict]:
    folder = tmp_path_factory.mktemp("int8")
    model = describe(leaky_net(folder / "net.onnx"))
    return model, convert(model, folder / "net-int8.onnx", "int8", SEEN, HELD_OUT)


def test_int8_comes_close_and_says_what_it_is(made: tuple[Descriptor, Verdict]) -> None:
    model, verdict = made
    assert verdict.frames == 2
    assert verdict.psnr_db[0] > 50
    assert verdict.psnr_db[1:] == (100.0, 100.0)  # chroma does not pass the model
    assert verdict.worst_db <= verdict.psnr_db[0]
    copy = describe(verdict.path)
    assert (copy.precision, copy.source_sha256) == ("int8", model.sha256)
    for key in ("name", "scale", "channels", "range", "multiple", "overlap"):
        assert getattr(copy, key) == getattr(model, key), key
    assert json.loads(json.dumps(verdict.to_dict()))["precision"] == "int8"


def test_its_figure_is_what_a_run_gives(made: tuple[Descriptor, Verdict]) -> None:
    model, verdict = made
    outputs = []
    for d in (model, describe(verdict.path)):
        session = HostSession(compile_model(d, SPEC), threads=1)
        planes = [np.empty(t.plane_shape, t.dtype) for t in session.compiled.outputs]
        session.bind(0, planes)
        session.run(0, HELD_OUT[0].planes)
        outputs.append(planes[0].astype(float))
    psnr = 10 * np.log10(255**2 / np.square(outputs[0] - outputs[1]).mean())
    assert psnr == pytest.approx(verdict.psnr_db[0], abs=1.5)
    assert psnr < 99  # not the same arithmetic


def test_convolutions_and_activations_really_run_in_int8(made: tuple[Descriptor, Verdict]) -> None:
    """Fused by ONNX Runtime; the linear branch alone is a float convolution."""
    ort = import_onnxruntime()
    model = describe(made[1].path)
    compiled = compile_model(model, SPEC)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(model.path.with_suffix(".optimised.onnx"))
    ort.InferenceSession(
        compiled.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("QLinearConv") == 4
    assert kinds.count("QLinearLeakyRelu") == 3
    assert "LeakyRelu" not in kinds
    assert "QLinearAdd" not in kinds
    luma_convs = [
        n
        for n in onnx.load(options.optimized_model_filepath).graph.node
        if n.op_type in ("Conv", "FusedConv") and not n.name.startswith("vidpipe/")
    ]
    assert len(luma_convs) == 1


def test_weights_are_within_seven_bits_when_asked(tmp_path: Path) -> None:
    model = describe(leaky_net(tmp_path / "net.onnx"))
    for reduced, top in ((True, 64), (False, 127)):
        out = tmp_path / f"{reduced}.onnx"
        verdict = convert(model, out, "int8", SEEN, HELD_OUT, reduce_range=reduced)
        assert verdict.reduced is reduced
        weights = [
            onnx.numpy_helper.to_array(i)
            for i in onnx.load(str(out)).graph.initializer
            if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4
        ]
        assert len(weights) == 4
        assert all(63 <= np.abs(w.astype(int)).max() <= top for w in weights)
        scales = [
            i for i in onnx.load(str(out)).graph.initializer
            if i.name.endswith("_scale") and len(i.dims) == 1 and i.dims[0] == 16
        ]  # fmt: skip
        assert scales  # one for each channel


def test_refitting_and_rounding_beat_plain_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = describe(leaky_net(tmp_path / "net.onnx"))
    fitted = convert(model, tmp_path / "a.onnx", "int8", SEEN, HELD_OUT, reduce_range=True)
    monkeypatch.setattr(ptq, "_fit", lambda proto, *_: (proto, {}))
    plain = convert(model, tmp_path / "b.onnx", "int8", SEEN, HELD_OUT, reduce_range=True)
    assert fitted.psnr_db[0] > plain.psnr_db[0] + 1


@pytest.mark.parametrize("kind", ["relu", "residual", "prelu", "rgb", "nv12", "ten bits"])
def test_other_networks_and_formats(tmp_path: Path, kind: str) -> None:
    name = {"nv12": "nv12", "ten bits": "yuv420p10le"}.get(kind, "yuv420p")
    path = tmp_path / "net.onnx"
    if kind in ("relu", "rgb"):
        random_net(path, channels=3 if kind == "rgb" else 1, unshuffle=2)
    else:
        leaky_net(path, residual=kind == "residual", prelu=kind == "prelu")
    frames = [picture(n, name) for n in range(8)]
    verdict = convert(describe(path), tmp_path / "o.onnx", "int8", frames[:6], frames[6:])
    assert verdict.psnr_db[0] >= FLOORS["int8"]
    copy = describe(verdict.path)
    session = HostSession(compile_model(copy, frames[0].spec), threads=1)
    assert sum(session.nodes_by_provider().values()) > 10


def test_a_model_of_one_size_is_calibrated_on_a_part_of_the_frame(tmp_path: Path) -> None:
    fixed = random_net(
        tmp_path / "m.onnx", unshuffle=2, shape=[1, 1, 32, 48], out_shape=[1, 1, 64, 96]
    )
    verdict = convert(describe(fixed), tmp_path / "o.onnx", "int8", SEEN, HELD_OUT)
    assert describe(verdict.path).size == (48, 32)
    small = [picture(0, width=32, height=32)]
    with pytest.raises(ModelError, match="48x32 only, the clip is 32x32"):
        convert(describe(fixed), tmp_path / "p.onnx", "int8", small, small)


def test_float16(tmp_path: Path) -> None:
    model = describe(leaky_net(tmp_path / "net.onnx"))
    verdict = convert(model, tmp_path / "half.onnx", "fp16", [], HELD_OUT)
    assert FLOORS["fp16"] <= verdict.psnr_db[0] <= 100
    assert verdict.bytes_after < 0.75 * verdict.bytes_before
    copy = describe(verdict.path)
    assert (copy.precision, copy.dtype) == ("fp16", np.float16)


def test_below_the_floor_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = describe(leaky_net(tmp_path / "net.onnx"))
    out = tmp_path / "o.onnx"
    out.write_bytes(b"before")
    monkeypatch.setitem(FLOORS, "int8", 99.0)
    with pytest.raises(ModelError, match=r"comes to \d\d\.\d dB .* the floor is 99 dB"):
        convert(model, out, "int8", SEEN, HELD_OUT)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "o.onnx"]


def test_a_network_that_8_bits_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Large values that cancel each other out."""
    net = Net(1)
    both = np.zeros((2, 1, 1, 1))
    both[:, 0, 0, 0] = 1000.0, 1000.0
    net.conv(both, np.array([5000.0, 5000.5])).add("Relu")
    net.conv(np.array([-1.0, 1.0]).reshape(1, 2, 1, 1) * 1.0, np.array([0.0]))
    path = net.save(tmp_path / "m.onnx", metadata={"vidpipe.scale": "1", "vidpipe.range": "0..1"})
    with pytest.raises(ModelError, match="floor is 45 dB"):
        convert(describe(path), tmp_path / "o.onnx", "int8", SEEN, HELD_OUT)


def test_what_cannot_be_converted_is_said(tmp_path: Path, made: tuple[Descriptor, Any]) -> None:
    model = made[0]
    with pytest.raises(ModelError, match="quantised already"):
        convert(describe(made[1].path), tmp_path / "o.onnx", "int8", SEEN, HELD_OUT)
    with pytest.raises(ModelError, match="int8 or fp16"):
        convert(model, tmp_path / "o.onnx", "int4", SEEN, HELD_OUT)
    with pytest.raises(ModelError, match="too few frames"):
        convert(model, tmp_path / "o.onnx", "int8", SEEN, [])
    plain = describe(nearest(tmp_path / "n.onnx", 2))
    with pytest.raises(ModelError, match="no convolutions"):
        convert(plain, tmp_path / "o.onnx", "int8", SEEN, HELD_OUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(model, tmp_path / "file" / "o.onnx", "int8", SEEN, HELD_OUT)


@pytest.mark.parametrize(("count", "clips"), [(200, 1), (29, 1), (8, 1), (3, 1), (100, 5), (1, 1)])
def test_no_frame_is_calibrated_on_and_compared(count: int, clips: int) -> None:
    seen, checked = pick(count, clips)
    assert not seen & checked
    assert all(0 <= n < count for n in seen | checked)
    if count >= 28 and clips == 1:
        assert (len(seen), len(checked)) == (20, 8)
    if count >= 3:
        assert seen
        assert checked


# -- which file runs ----------------------------------------------------------------------


def test_the_nano_tier_has_int8_copies_of_its_very_files() -> None:
    assert [p.stem for p in INT8] == ["clean-1x-nano", "clean-2x-nano", "nano-2x"]
    for path in INT8:
        original, copy = describe(find_model(path.stem)), describe(path)
        assert copy.source_sha256 == original.sha256
        assert copy.precision == "int8"
        assert path.stat().st_size < 60_000
        kinds = [n.op_type for n in onnx.load(str(path)).graph.node]
        assert kinds.count("Conv") == (5 if "1x" in path.stem else 6)
    assert "int8" not in {m.precision for m in builtin_models()}


@pytest.mark.parametrize("path", INT8, ids=lambda p: p.stem)
def test_shipped_copies_come_close_on_the_sample(path: Path) -> None:
    """Least of what they reach on the sample clip, with a margin for other processors."""
    from itertools import islice

    import vidpipe

    clip = Path(__file__).parent.parent / "samples" / "bigbuckbunny.mp4"
    frames = [next(islice(vidpipe.read(clip), 40, None))]
    planes = quantize._compare(describe(find_model(path.stem)), describe(path), frames, None)
    assert planes[0][0] > 50


def test_precision_says_which_file_runs() -> None:
    nano, fast = describe(find_model("nano-2x")), describe(find_model("fast-2x"))
    assert variant(nano, "int8", on_cpu=True).model.path.parent.name == "int8"
    for precision in ("auto", "fp32"):
        on_cpu = variant(nano, precision, on_cpu=True)
        assert (on_cpu.model, on_cpu.half, on_cpu.precision) == (nano, False, "fp32")
    for model in (nano, fast):
        on_gpu = variant(model, "auto", on_cpu=False)
        assert (on_gpu.model, on_gpu.half, on_gpu.precision) == (model, True, "fp16")
    assert not variant(nano, "fp32", on_cpu=False).half
    assert PRECISIONS == ("auto", "fp32", "fp16", "int8", "fp8", "fp4")


def test_a_precision_that_is_not_there_is_said() -> None:
    fast, copy = describe(find_model("fast-2x")), describe(INT8[0])
    with pytest.raises(ModelError, match=r"no copy in int8.*models quantize fast-2x"):
        raise _text(lambda: variant(fast, "int8", on_cpu=True))
    with pytest.raises(ModelError, match="float16 models in float32"):
        variant(fast, "fp16", on_cpu=True)
    with pytest.raises(SpecError, match="CUDA runs no convolutions in int8"):
        variant(fast, "int8", on_cpu=False, provider="cuda")
    with pytest.raises(SpecError, match="CUDA runs no convolutions in int8"):
        variant(copy, "auto", on_cpu=False, provider="cuda")
    with pytest.raises(ModelError, match="is in int8, fp32 was asked for"):
        variant(copy, "fp32", on_cpu=True)
    with pytest.raises(SpecError, match="'int4' is not known"):
        variant(fast, "int4", on_cpu=True)
    assert variant(copy, "auto", on_cpu=True).model == copy


def _text(call: Any) -> ModelError:
    """The error with its hint as its message."""
    try:
        call()
    except ModelError as error:
        return ModelError(str(error))
    raise AssertionError


def test_a_copy_of_another_file_does_not_count(tmp_path: Path) -> None:
    model = describe(leaky_net(tmp_path / "net.onnx"))
    path = converted_path(model.path, "int8")
    assert path == tmp_path / "net-int8.onnx"
    assert int8_copy(model) is None
    convert(model, path, "int8", SEEN, HELD_OUT)
    copy = int8_copy(describe(model.path))
    assert copy is not None
    assert copy.path == path
    leaky_net(model.path, residual=True)
    assert int8_copy(describe(model.path)) is None


# -- the command --------------------------------------------------------------------------


def command(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidpipe", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "COLUMNS": "200", "VIDPIPE_CACHE": str(cache)},
    )


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    import av

    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(12):
            planes = picture(number).planes
            packed = np.concatenate([p.reshape(-1) for p in planes]).reshape(96, 96)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(packed, "yuv420p")))
        container.mux(stream.encode(None))
    return path


def test_quantize_from_the_command_line(tmp_path: Path, clip: Path) -> None:
    path = leaky_net(tmp_path / "net.onnx")
    done = command("models", "quantize", path, "--calibrate", clip, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'net-int8.onnx'}: int8, ")
    assert "on 4 other frames: PSNR Y " in second
    assert "floor 45" in second
    assert done.stderr == ""
    half = command(
        "models", "quantize", path, "--fp16", "--calibrate", clip, "--json", cache=tmp_path
    )
    assert json.loads(half.stdout)["precision"] == "fp16"
    again = command(
        "models", "quantize", tmp_path / "net-int8.onnx", "--calibrate", clip, cache=tmp_path
    )
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "quantised already" in again.stderr


def test_models_and_cache_from_the_command_line(tmp_path: Path) -> None:
    listed = json.loads(command("models", "--json", cache=tmp_path).stdout)["models"]
    copies = {m["name"] for m in listed if m["int8"]}
    assert copies == {"nano-2x", "clean-1x-nano", "clean-2x-nano"}
    warm = command("cache", "warm", "restore-2x", "--size", "96x64", cache=tmp_path / "cache")
    assert warm.returncode == 0, warm.stderr
    assert "nodes on " in warm.stdout
    Cache(tmp_path / "cache").write("choice", {"a": 1}, 1)
    shown = command("cache", "list", "--json", cache=tmp_path / "cache")
    assert [e["kind"] for e in json.loads(shown.stdout)["entries"]] == ["choice"]
    assert "choice" in command("cache", "list", cache=tmp_path / "cache").stdout
    assert "1 entries deleted" in command("cache", "clear", cache=tmp_path / "cache").stdout
    assert Cache(tmp_path / "cache").entries() == []
    wrong = command("cache", "warm", "restore-2x", "--size", "96", cache=tmp_path)
    assert wrong.returncode == 2
    assert "WIDTHxHEIGHT" in wrong.stderr
