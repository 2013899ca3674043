"""Execution providers: finding, registering, refusing, and running on nothing else.

The CPU provider is always real. The plug-ins are real where they are installed; the rest is
held against fakes that have ONNX Runtime's documented interface.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests import modelgen
from vidpipe import providers
from vidpipe.device import CPU, Device
from vidpipe.errors import DeviceError, SpecError
from vidpipe.frame import Color, FrameSpec, pixel_format
from vidpipe.model.compile import compile_model
from vidpipe.model.descriptor import describe
from vidpipe.model.session import HostSession
from vidpipe.model.stage import Model
from vidpipe.providers import Target, all_providers, known_providers, provider, winml
from vidpipe.providers.base import Found, Provider, Request, all_devices, device_kind, find
from vidpipe.providers.runtime import import_onnxruntime
from vidpipe.testing import pattern


def spec_of(width: int = 64, height: int = 48, name: str = "yuv420p") -> FrameSpec:
    return FrameSpec(
        width=width,
        height=height,
        format=pixel_format(name),
        color=Color(),
        time_base=Fraction(1, 25),
    )


# -- a fake of ONNX Runtime ------------------------------------------------------------------


class FakeDevice:
    def __init__(self, ep_name: str, kind: str = "GPU") -> None:
        self.ep_name = ep_name
        self.device = SimpleNamespace(type=f"OrtHardwareDeviceType.{kind}")


class FakeRuntime:
    """Plug-ins list their devices once their library is registered."""

    __version__ = "1.31.0"

    def __init__(self, plug_ins: dict[str, list[FakeDevice]], built_in: list[str] | None = None):
        self.plug_ins = plug_ins
        self.built_in = built_in or ["CPUExecutionProvider"]
        self.registered: list[tuple[str, str]] = []

    def get_available_providers(self) -> list[str]:
        return self.built_in

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if any(name == n for n, _ in self.registered):
            raise RuntimeError(f"EP library is already registered under {name}")
        self.registered.append((name, path))

    def get_ep_devices(self) -> list[FakeDevice]:
        return [d for n, _ in self.registered for d in self.plug_ins.get(n, [])]


class Plugged(Provider):
    name = "plugged"
    ep = "PluggedExecutionProvider"
    title = "Plugged"
    package = "vidpipe_test_plugged"
    install = "pip install vidpipe-test-plugged"


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugged]:
    folder = tmp_path / "vidpipe_test_plugged"
    folder.mkdir()
    (folder / "__init__.py").write_text("def get_library_path(): return '/lib/plugged.so'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Plugged()
    sys.modules.pop("vidpipe_test_plugged", None)


# -- descriptors -----------------------------------------------------------------------------


def test_every_file_describes_a_provider() -> None:
    assert {"cpu", "cuda", "directml", "openvino", "rtx", "webgpu", "winml"} <= set(
        known_providers()
    )
    for found in all_providers():
        assert found is provider(found.name)
        assert found.title
        assert found.install.startswith("pip ")
        assert found.memory in ("cpu", "cuda")
        assert found.memory == "cpu" or (found.graph_option and found.graph_id)


def test_another_package_adds_one_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="plugged", load=Plugged)
    monkeypatch.setattr(providers, "entry_points", lambda group: [entry])
    assert isinstance(Target.parse("plugged").provider, Plugged)
    assert "plugged" in [p.name for p in all_providers()]


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("cpu", "cpu", CPU),
        ("cuda", "cuda", Device("cuda")),
        ("cuda:1", "cuda", Device("cuda", 1)),
        ("rtx", "rtx", Device("cuda")),
        ("openvino:npu", "openvino", CPU),
        ("webgpu", "webgpu", CPU),
        ("directml:1", "directml", CPU),
        ("winml:QNN", "winml", CPU),
    ],
)
def test_a_device_names_a_provider_and_a_place(text: str, name: str, place: Device) -> None:
    target = Target.parse(text)
    assert (target.provider.name, target.place, str(target)) == (name, place, text)


@pytest.mark.parametrize("text", ["", "gpu", "cuda:x", "cuda:", "cpu:one", "rtx:-1"])
def test_other_names_are_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(DeviceError, match="not known"):
        Target.parse(text)


def test_options_follow_the_request() -> None:
    settings = json.loads(
        provider("openvino").options(Request(threads=3, kind="cpu"))["load_config"]
    )
    assert settings["CPU"]["INFERENCE_NUM_THREADS"] == 3
    assert settings["CPU"]["INFERENCE_PRECISION_HINT"] == "f32"
    on_npu = json.loads(provider("openvino").options(Request(kind="npu"))["load_config"])
    assert on_npu == {"NPU": {"PERFORMANCE_HINT": "LATENCY"}}
    assert provider("cuda").options(Request(index=1))["device_id"] == "1"
    assert provider("directml").options(Request(index=2))["device_id"] == "2"
    rtx = provider("rtx")
    assert "nv_runtime_cache_path" not in rtx.options(Request())
    assert rtx.options(Request(cache=Path("/c")))["nv_runtime_cache_path"] == str(Path("/c"))
    assert rtx.graph_option == "enable_cuda_graph"
    assert rtx.graph_id == "cuda_graph_annotation_id"


@pytest.mark.parametrize(("prefer", "spin"), [("speed", "0"), ("latency", "1")])
def test_idle_threads_spin_only_for_latency(prefer: str, spin: str) -> None:
    options = onnxruntime.SessionOptions()
    provider("cpu").configure(options, Request(prefer=prefer, threads=3))
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spin


# -- finding ---------------------------------------------------------------------------------


def test_a_plug_in_is_registered_once_and_found_whatever_its_case(plugged: Plugged) -> None:
    runtime = FakeRuntime({plugged.ep: [FakeDevice("pluggedEXECUTIONPROVIDER")]})
    for _ in range(2):
        found = find(plugged, runtime)
    assert runtime.registered == [(plugged.ep, "/lib/plugged.so")]
    assert found.ep == "pluggedEXECUTIONPROVIDER"
    assert found.kind == "gpu"


def test_a_plug_in_without_a_device_is_missing_not_the_cpu(plugged: Plugged) -> None:
    runtime = FakeRuntime({})
    for _ in range(2):  # the second time it is registered already
        with pytest.raises(DeviceError, match="Plugged finds no device here"):
            find(plugged, runtime)


def test_missing_packages_say_their_install_line() -> None:
    with pytest.raises(DeviceError, match="pip install vidpipe-test-plugged"):
        find(Plugged(), FakeRuntime({}))
    with pytest.raises(DeviceError, match="has no CUDAExecutionProvider") as caught:
        find(provider("cuda"), FakeRuntime({}))
    if sys.platform != "darwin":
        assert "vidpipe[cuda13]" in str(caught.value)


def test_a_wheel_that_does_not_load_is_reported(plugged: Plugged, tmp_path: Path) -> None:
    (tmp_path / "vidpipe_test_plugged" / "__init__.py").write_text("raise OSError('no libfoo')\n")
    with pytest.raises(DeviceError, match="does not load: no libfoo"):
        find(plugged, FakeRuntime({}))


def test_a_library_that_the_runtime_refuses_is_reported(plugged: Plugged) -> None:
    runtime = FakeRuntime({})

    def refuse(name: str, path: str) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : version is too old")

    runtime.register_execution_provider_library = refuse  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="cannot be loaded: version is too old"):
        find(plugged, runtime)


def test_old_runtimes_take_no_plug_ins(plugged: Plugged) -> None:
    runtime = SimpleNamespace(__version__="1.20.0", get_available_providers=list)
    with pytest.raises(DeviceError, match="takes no plug-in"):
        find(plugged, runtime)


def test_the_device_follows_the_preference_and_the_name(plugged: Plugged) -> None:
    devices = [FakeDevice(plugged.ep, kind) for kind in ("CPU", "NPU", "GPU")]
    runtime = FakeRuntime({plugged.ep: devices})
    assert find(plugged, runtime).kind == "gpu"
    assert find(plugged, runtime, prefer="efficiency").kind == "npu"
    assert find(plugged, runtime, "cpu").kind == "cpu"
    assert find(plugged, runtime, "2").device is devices[2]
    assert find(plugged, FakeRuntime({plugged.ep: devices[:1]})).kind == "cpu"
    with pytest.raises(DeviceError, match="one of cpu"):
        find(plugged, FakeRuntime({plugged.ep: devices[:1]}), "npu")
    assert {device_kind(d) for d in all_devices(plugged, runtime)} == {"cpu", "gpu", "npu"}


def test_what_a_session_is_given(plugged: Plugged) -> None:
    device = FakeDevice(plugged.ep)
    given: list[Any] = []
    options = SimpleNamespace(add_provider_for_devices=lambda d, o: given.append((d, o)))
    assert Found(plugged, plugged.ep, device).attach(options, {"a": "b"}) == {}
    assert given == [([device], {"a": "b"})]
    built_in = Found(provider("cpu"), "CPUExecutionProvider")
    assert built_in.attach(options, {}) == {"providers": [("CPUExecutionProvider", {})]}


@pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT-RTX does not exist for macOS")
@pytest.mark.parametrize(
    ("capability", "taken"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), False),
        ((12, 0), True),
        (None, True),
    ],
)
def test_rtx_refuses_chips_that_it_has_no_kernels_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, taken: bool
) -> None:
    from vidpipe.providers import rtx

    monkeypatch.setattr(rtx, "compute_capability", lambda device: capability)
    # As Microsoft spells it.
    runtime = FakeRuntime({rtx.PROVIDER.ep: [FakeDevice("NvTensorRtRtxExecutionProvider")]})
    runtime.registered.append((rtx.PROVIDER.ep, ""))
    monkeypatch.setattr(rtx.PROVIDER, "installed", lambda: True)
    if taken:
        assert find(rtx.PROVIDER, runtime).ep == "NvTensorRtRtxExecutionProvider"
        assert not rtx.PROVIDER.refuses(Device("cuda", 0))
    else:
        assert capability is not None
        with pytest.raises(DeviceError, match=f"has {capability[0]}.{capability[1]}"):
            find(rtx.PROVIDER, runtime)


def test_the_rtx_wheel_gets_its_cuda_runtime_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidpipe.providers import rtx

    (tmp_path / "libcudart.so.12.9.79").touch()
    loaded: list[str] = []
    monkeypatch.setattr(rtx.ctypes, "CDLL", lambda name, mode: loaded.append(name))
    monkeypatch.setattr(rtx.sys, "platform", "linux")
    rtx.PROVIDER.prepare(tmp_path)
    assert loaded == [str(tmp_path / "libcudart.so.12.9.79")]


# -- Windows ML's catalogue ------------------------------------------------------------------


class FakeEntry:
    def __init__(self, name: str, ready_state: int) -> None:
        self.name, self.version, self.ready_state = name, "1.0", ready_state
        self.library_path = f"C:/{name}.dll"
        self.fails = False

    def ensure_ready_async(self, on_complete: Any = None, on_progress: Any = None) -> Any:
        entry = self

        class Work:
            def __enter__(self) -> Work:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def wait(self) -> None:
                if entry.fails:
                    raise OSError("0x80070002")
                on_progress(0.5)
                on_progress(1.0)
                entry.ready_state = 0

        return Work()


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> list[FakeEntry]:
    entries = [
        FakeEntry("QNNExecutionProvider", 0),
        FakeEntry("NvTensorRtRtxExecutionProvider", 2),
    ]

    class EpCatalog:
        closed = False

        def find_all_providers(self) -> list[FakeEntry]:
            assert not self.closed
            return entries

        def __enter__(self) -> EpCatalog:
            return self

        def __exit__(self, *_: object) -> None:
            self.closed = True

    monkeypatch.setitem(sys.modules, "windowsml", SimpleNamespace(EpCatalog=EpCatalog))
    monkeypatch.setattr(winml.PROVIDER, "installed", lambda: True)
    monkeypatch.setattr(winml.PROVIDER, "here", lambda: True)
    monkeypatch.setattr(winml, "listeners", [])
    monkeypatch.delenv(winml.OFFLINE, raising=False)
    return entries


def test_a_catalogue_entry_is_registered_under_its_name(catalogue: list[FakeEntry]) -> None:
    runtime = FakeRuntime({"QNNExecutionProvider": [FakeDevice("QNNExecutionProvider", "NPU")]})
    found = find(winml.PROVIDER, runtime, "qnn")
    assert (found.ep, found.kind) == ("QNNExecutionProvider", "npu")
    assert runtime.registered == [("QNNExecutionProvider", "C:/QNNExecutionProvider.dll")]


def test_a_missing_entry_is_downloaded_with_progress(catalogue: list[FakeEntry]) -> None:
    name = "NvTensorRtRtxExecutionProvider"
    shares: list[tuple[str, float]] = []
    winml.listeners.append(lambda who, share: shares.append((who, share)))
    runtime = FakeRuntime({name: [FakeDevice(name)]})
    assert find(winml.PROVIDER, runtime, "NvTensorRTRTX").ep == name
    assert shares == [(name, 0.5), (name, 1.0)]


def test_offline_downloads_nothing(
    catalogue: list[FakeEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(winml.OFFLINE, "1")
    with pytest.raises(DeviceError, match="downloads are off"):
        find(winml.PROVIDER, FakeRuntime({}), "NvTensorRtRtx")
    assert catalogue[1].ready_state == 2
    assert winml.catalogue_entries()[0] == ("QNNExecutionProvider", "1.0", True)


def test_what_goes_wrong_with_the_catalogue_is_said(
    catalogue: list[FakeEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match=r"has no 'Foo'.*QNNExecutionProvider"):
        find(winml.PROVIDER, FakeRuntime({}), "Foo")
    with pytest.raises(DeviceError, match="which Windows ML provider"):
        find(winml.PROVIDER, FakeRuntime({}))
    catalogue[1].fails = True
    with pytest.raises(DeviceError, match=r"cannot make NvTensorRtRtx.* ready: 0x80070002"):
        find(winml.PROVIDER, FakeRuntime({}), "NvTensorRtRtx")
    monkeypatch.setitem(sys.modules, "windowsml", SimpleNamespace())
    with pytest.raises(DeviceError, match="cannot be asked"):
        find(winml.PROVIDER, FakeRuntime({}), "QNN")


# -- real sessions ---------------------------------------------------------------------------


class Ggml(Provider):
    name = "ggml"
    ep = "onnxruntime_ggml"
    title = "ggml"
    package = "onnxruntime_ggml"
    install = "pip install onnxruntime-ggml"
    kind = "cpu"


@pytest.fixture
def ggml(monkeypatch: pytest.MonkeyPatch) -> Provider:
    if importlib.util.find_spec("onnxruntime_ggml") is None:
        pytest.skip("onnxruntime-ggml is not installed")
    entry = SimpleNamespace(name="ggml", load=Ggml)
    monkeypatch.setattr(providers, "entry_points", lambda group: [entry])
    return Ggml()


def needs(name: str) -> None:
    try:
        Target.parse(name).find()
    except DeviceError as error:
        pytest.skip(str(error))


def planes(device: str, model: Path | str, spec: FrameSpec, **options: Any) -> list[Any]:
    stage = Model(model=str(model), device=device, wait_compile=True, **options)
    stage.plan(spec)
    stage.open()
    (out,) = stage.process(pattern(spec))
    result = [plane.copy() for plane in out.planes]
    stage.close()
    return result


def test_the_cpu_provider_runs_all_and_says_so() -> None:
    stage = Model(model="nano-2x", device="cpu")
    spec = spec_of()
    stage.plan(spec)
    stage.open()
    stage.process(pattern(spec))
    stage.close()
    report = stage.report()
    assert report["provider"] == "cpu"
    assert report["nodes"].keys() == {"CPUExecutionProvider"}
    assert report["cpu_nodes"] == []


@pytest.mark.parametrize("name", ["yuv420p", "yuv420p10le", "nv12", "p010le", "gbrp", "gray"])
def test_openvino_gives_what_the_cpu_gives(name: str) -> None:
    needs("openvino:cpu")
    spec = spec_of(80, 48, name)
    for got, expected in zip(
        planes("openvino:cpu", "nano-2x", spec), planes("cpu", "nano-2x", spec), strict=True
    ):
        unit = 1 << (spec.format.bits - 8 + spec.format.shift)
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= unit


def test_openvino_runs_every_node_in_tiles_and_at_any_strength() -> None:
    needs("openvino:cpu")
    spec = spec_of(96, 64)
    tiled = Model(
        model="clean-1x-nano", device="openvino", tile="64x64", strength=0.0, wait_compile=True
    )
    tiled.plan(spec)
    tiled.open()
    frame = pattern(spec)
    (same,) = tiled.process(frame)
    assert np.abs(same.planes[0].astype(int) - frame.planes[0].astype(int)).max() <= 1
    tiled.close()
    assert tiled.report()["nodes"].keys() == {"OpenVINOExecutionProvider"}


def test_openvino_never_leaves_a_node_to_the_cpu_in_silence(tmp_path: Path) -> None:
    needs("openvino:cpu")
    net = modelgen.Net(1, opset=17).conv(np.ones((1, 1, 1, 1)))
    # An operator that OpenVINO does not have.
    path = net.add("LpPool", kernel_shape=[1, 1]).save(tmp_path / "odd.onnx")
    spec = spec_of(32, 32, "gray")
    with pytest.raises(DeviceError, match=r"does not take LpPool, .*--allow-cpu-nodes"):
        planes("openvino", path, spec)
    stage = Model(model=str(path), device="openvino", allow_cpu_nodes=True, wait_compile=True)
    stage.plan(spec)
    stage.open()
    (out,) = stage.process(pattern(spec))
    np.testing.assert_array_equal(out.planes[0], planes("cpu", path, spec)[0])
    stage.close()
    report = stage.report()
    assert [node["op"] for node in report["cpu_nodes"]] == ["LpPool"]
    assert report["nodes"]["OpenVINOExecutionProvider"] > 1
    assert "the CPU ran nodes of the model: LpPool" in report["notes"][0]


def test_openvino_reads_what_is_in_a_buffer_at_each_run() -> None:
    """Its inputs are copied when they are bound; buffers and the strength change later."""
    needs("openvino:cpu")
    spec = spec_of(64, 48)
    stage = Model(model="clean-1x-nano", device="openvino", strength=0.0, wait_compile=True)
    stage.plan(spec)
    stage.open()
    frame = pattern(spec)
    (first,) = stage.process(frame)
    assert np.abs(first.planes[0].astype(int) - frame.planes[0]).max() <= 1
    frame.planes[0][...] = 255 - frame.planes[0]
    (second,) = stage.process(frame)
    assert np.abs(second.planes[0].astype(int) - frame.planes[0]).max() <= 1
    del first, second
    stage.set_strength(1.0)
    (third,) = stage.process(frame)
    assert np.abs(third.planes[0].astype(int) - frame.planes[0]).max() > 5
    stage.close()


def test_a_plug_in_that_takes_nothing_is_an_error(ggml: Provider) -> None:
    """`get_providers()` lists it first all the same, and the CPU would run everything."""
    for allowed in (False, True):
        with pytest.raises(DeviceError, match=r"takes none of the model's .* nodes"):
            planes("ggml", "nano-2x", spec_of(), allow_cpu_nodes=allowed)


def test_a_plug_in_that_takes_all_runs_all(ggml: Provider, tmp_path: Path) -> None:
    path = modelgen.Net(1).add("Relu").save(tmp_path / "relu.onnx")
    spec = spec_of(32, 32, "gray")
    got = planes("ggml", path, spec)[0]
    assert np.abs(got.astype(int) - planes("cpu", path, spec)[0]).max() <= 1


class FakeSession:
    """A session of a runtime that gave some nodes to the CPU."""

    def __init__(self, *parts: tuple[str, list[tuple[str, str]]]) -> None:
        self.parts = parts

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(
                ep_name=ep,
                get_nodes=lambda nodes=nodes: [
                    SimpleNamespace(name=n, op_type=o) for n, o in nodes
                ],
            )
            for ep, nodes in self.parts
        ]


def session_on(
    monkeypatch: pytest.MonkeyPatch,
    plugged: Plugged,
    result: FakeSession,
    *,
    refuses: bool,
    **options: Any,
) -> tuple[HostSession, list[dict[str, str]]]:
    """Open a session on a fake plug-in; return it and the configuration of each attempt."""
    seen: list[dict[str, str]] = []

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}
            seen.append(self.entries)

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

        def add_provider_for_devices(self, devices: Any, options: Any) -> None:
            self.entries["ep"] = devices[0].ep_name

    def inference_session(model: bytes, options: Options, **kwargs: Any) -> FakeSession:
        assert kwargs == {"enable_fallback": 0}
        if refuses and options.entries.get("session.disable_cpu_ep_fallback") == "1":
            raise RuntimeError("but fallback to CPU EP has been explicitly disabled by the user.")
        return result

    fake = SimpleNamespace(SessionOptions=Options, InferenceSession=inference_session)
    monkeypatch.setattr("vidpipe.model.session.import_onnxruntime", lambda: fake)
    compiled = compile_model(describe(modelgen_identity()), spec_of(32, 32, "gray"))
    found = Found(plugged, plugged.ep, FakeDevice(plugged.ep))
    return HostSession(compiled, found, **options), seen


def modelgen_identity() -> Path:
    from vidpipe.model.descriptor import find_model

    return find_model("nano-2x")


def test_nodes_on_the_cpu_are_named_in_the_error(
    monkeypatch: pytest.MonkeyPatch, plugged: Plugged
) -> None:
    odd = [("loop", "Loop"), ("", "NonZero")]
    result = FakeSession((plugged.ep, [("a", "Conv")]), ("CPUExecutionProvider", odd))
    with pytest.raises(DeviceError) as caught:
        session_on(monkeypatch, plugged, result, refuses=True)
    assert "does not take Loop 'loop', NonZero, 2 of 3 nodes" in str(caught.value)
    assert "--allow-cpu-nodes" in str(caught.value)


def test_nodes_on_the_cpu_are_listed_where_they_are_allowed(
    monkeypatch: pytest.MonkeyPatch, plugged: Plugged
) -> None:
    result = FakeSession((plugged.ep, [("a", "Conv")]), ("CPUExecutionProvider", [("l", "Loop")]))
    session, seen = session_on(monkeypatch, plugged, result, refuses=True, allow_cpu_nodes=True)
    assert [str(node) for node in session.cpu_nodes] == ["Loop 'l'"]
    assert len(seen) == 1
    assert "session.disable_cpu_ep_fallback" not in seen[0]


def test_the_fallback_is_forbidden_by_default(
    monkeypatch: pytest.MonkeyPatch, plugged: Plugged
) -> None:
    _, seen = session_on(
        monkeypatch, plugged, FakeSession((plugged.ep, [("a", "Conv")])), refuses=False
    )
    assert seen[0]["session.disable_cpu_ep_fallback"] == "1"
    assert seen[0]["ep"] == plugged.ep


def test_a_provider_that_nobody_asked_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch, plugged: Plugged
) -> None:
    result = FakeSession((plugged.ep, [("a", "Conv")]), ("OtherExecutionProvider", [("b", "Add")]))
    with pytest.raises(DeviceError, match="got OtherExecutionProvider"):
        session_on(monkeypatch, plugged, result, refuses=False, allow_cpu_nodes=True)


def test_control_flow_runs_on_the_cpu_provider(tmp_path: Path) -> None:
    """And is compared with what was asked for like any other node."""
    path = modelgen.identity(tmp_path / "same.onnx")
    spec = spec_of(32, 32, "gray")
    np.testing.assert_array_equal(planes("cpu", path, spec)[0], pattern(spec).planes[0])


def test_frames_elsewhere_are_refused() -> None:
    with pytest.raises(SpecError, match="runs on cuda:0, the frames are on cpu"):
        Model(model="nano-2x", device="rtx").plan(spec_of())
    with pytest.raises(SpecError, match="prefer"):
        Model(model="nano-2x", prefer="best")


def test_the_real_runtime_is_found() -> None:
    assert find(provider("cpu"), import_onnxruntime()).ep == "CPUExecutionProvider"
