"""`vidpipe devices` and `vidpipe doctor`: every finding, and the gathering for real."""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from vidpipe import machine
from vidpipe.cli import app
from vidpipe.commands.devices import lines, listing
from vidpipe.doctor import CHECKS, DECODERS, ENCODERS, cupy_majors, examine, runtime_major
from vidpipe.machine import Facts, Gpu, ProviderState, gather, nvidia

CODECS = frozenset((*ENCODERS, *DECODERS))
CPU = ProviderState(name="cpu", title="ONNX Runtime on the CPU", devices=("cpu",), installed=True)
CUDA = ProviderState(name="cuda", title="CUDA", memory="cuda", devices=("gpu",), installed=True)
WEBGPU = ProviderState(name="webgpu", title="WebGPU", installed=True, problem="no device",
                       install="pip install onnxruntime-ep-webgpu")  # fmt: skip
GPU = Gpu(name="NVIDIA Test", memory_bytes=80 << 30, free_bytes=79 << 30, capability=(9, 0),
          decoders=("h264", "hevc"))  # fmt: skip

PLAIN = Facts(
    packages={"onnxruntime": "1.31.1", "av": "19.0.2"},
    runtime="1.31.1",
    available=("CPUExecutionProvider",),
    processor="A processor",
    cores=2,
    memory_bytes=8 << 30,
    codecs=CODECS,
    providers=(CPU,),
)
ON_GPU = replace(
    PLAIN,
    packages={"onnxruntime-gpu": "1.31.1", "cupy-cuda13x": "14.0", "av": "19.0.2"},
    gpus=(GPU,),
    driver="580.65",
    driver_cuda=(13, 0),
    libraries=frozenset(machine.LIBRARIES),
    providers=(CPU, CUDA),
)


def packages(facts: Facts, **changes: str | None) -> Facts:
    found = {**facts.packages, **{k.replace("_", "-"): v for k, v in changes.items()}}
    return replace(facts, packages={k: v for k, v in found.items() if v is not None})


def test_sound_environments_have_no_findings() -> None:
    assert examine(PLAIN) == []
    assert examine(ON_GPU) == []


CASES: dict[str, tuple[Facts, str, str, str]] = {
    "two runtimes": (
        packages(ON_GPU, onnxruntime="1.31.1"),
        "error",
        "onnxruntime and onnxruntime-gpu are both installed",
        'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime-gpu==1.31.1"',
    ),
    "no runtime": (
        packages(replace(PLAIN, runtime="", runtime_error="x"), onnxruntime=None),
        "error",
        "no ONNX Runtime is installed",
        "pip install 'vidpipe[cpu]'",
    ),
    "a runtime that does not load": (
        replace(PLAIN, runtime="", runtime_error="libfoo.so: not found"),
        "error",
        "libfoo.so",
        "--force-reinstall onnxruntime",
    ),
    "CuPy of another CUDA": (
        packages(ON_GPU, cupy_cuda13x=None, cupy_cuda12x="14.0"),
        "error",
        "cupy-cuda12x is for CUDA 12, onnxruntime-gpu 1.31.1 for CUDA 13",
        "pip uninstall -y cupy-cuda12x && pip install 'vidpipe[cuda13]'",
    ),
    "a runtime of another CUDA": (
        packages(ON_GPU, onnxruntime_gpu="1.26.0"),
        "error",
        "for CUDA 12",
        "vidpipe[cuda12]",
    ),
    "two CuPys": (
        packages(ON_GPU, cupy_cuda12x="14.0"),
        "error",
        "cupy-cuda12x and cupy-cuda13x are both installed",
        "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install cupy-cuda13x",
    ),
    "no CuPy": (
        packages(ON_GPU, cupy_cuda13x=None),
        "error",
        "CuPy is not installed",
        "vidpipe[cuda13]",
    ),
    "CuPy that does not work": (
        replace(ON_GPU, cupy_error="cudaErrorInsufficientDriver"),
        "error",
        "cudaErrorInsufficientDriver",
        "cupy-cuda13x",
    ),
    "no cuDNN": (
        replace(ON_GPU, libraries=frozenset({"cublas"})),
        "error",
        "cuDNN, which the CUDA provider loads, is missing",
        'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"',
    ),
    "no CUDA libraries": (
        replace(ON_GPU, libraries=frozenset()),
        "error",
        "cuBLAS and cuDNN, which the CUDA provider loads, are missing",
        "onnxruntime-gpu[cuda,cudnn]",
    ),
    "an old driver": (
        replace(ON_GPU, driver="550.54", driver_cuda=(12, 4)),
        "error",
        "driver 550.54 runs CUDA up to 12.4; the installed packages are for CUDA 13",
        "580 or later, or pip install 'vidpipe[cuda12]'",
    ),
    "no driver": (
        replace(ON_GPU, gpus=(), driver="", driver_cuda=(0, 0)),
        "warning",
        "no NVIDIA driver with a GPU answers",
        "driver",
    ),
    "a GPU that nobody uses": (
        replace(PLAIN, gpus=(GPU,), driver="580.65", driver_cuda=(13, 0)),
        "warning",
        "NVIDIA Test is here, but the installed ONNX Runtime is for the CPU",
        "pip uninstall -y onnxruntime && pip install 'vidpipe[cuda13]'",
    ),
    "no /sys/class/drm": (
        replace(ON_GPU, drm=False, providers=(CPU, CUDA, replace(WEBGPU, devices=("gpu",)))),
        "warning",
        "/sys/class/drm is not there, so WebGPU find no GPU",
        "/dev/dri",
    ),
    "a plug-in without a device": (
        replace(PLAIN, providers=(CPU, WEBGPU)),
        "warning",
        "WebGPU is installed but cannot be used: no device",
        "pip install -U onnxruntime-ep-webgpu",
    ),
    "no PyAV": (replace(PLAIN, codecs=frozenset()), "error", "PyAV does not load", "av"),
    "codecs": (
        replace(PLAIN, codecs=CODECS - {"libx265", "h264"}),
        "warning",
        "lacks libx265, h264",
        "--only-binary av",
    ),
    "an old Windows": (
        packages(replace(PLAIN, system="win32", build=22631), windowsml="2.5"),
        "warning",
        "Windows build 22631 has no catalogue",
        "24H2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found_and_mended(name: str) -> None:
    facts, level, message, mend = CASES[name]
    (finding,) = examine(facts)
    assert finding.level == level
    assert message in finding.message
    assert mend in finding.mend
    assert "\n" not in finding.message + finding.mend


def test_every_check_has_a_case() -> None:
    used = {check for facts, *_ in CASES.values() for check in CHECKS if list(check(facts))}
    assert used == set(CHECKS)


def test_errors_come_first() -> None:
    worst = replace(ON_GPU, libraries=frozenset(), codecs=frozenset({"aac"}))
    assert [f.level for f in examine(worst)] == ["error", "warning"]


@pytest.mark.parametrize(
    ("version", "major"), [("1.20.1", 12), ("1.26.0", 12), ("1.27.0", 13), ("2.0", 13)]
)
def test_the_runtime_wheels_changed_their_cuda(version: str, major: int) -> None:
    assert runtime_major(packages(PLAIN, onnxruntime_gpu=version)) == major
    assert runtime_major(PLAIN) is None
    assert cupy_majors(packages(PLAIN, cupy_cuda12x="14")) == [12]


def test_the_real_machine_is_gathered() -> None:
    facts = gather()
    assert facts.runtime == facts.packages.get("onnxruntime", facts.runtime)
    assert "CPUExecutionProvider" in facts.available
    assert facts.cores >= 1
    assert facts.memory_bytes > 1 << 28
    assert {"h264", "libx264"} <= facts.codecs
    states = {state.name: state for state in facts.providers}
    assert states["cpu"].devices == ("cpu",)
    assert all(state.devices or state.problem for state in facts.providers)
    assert json.loads(json.dumps(facts.to_dict()))["runtime"] == facts.runtime
    if not facts.gpus:
        assert not states["cuda"].devices


class FakeNvml:
    """NVIDIA's management library on a machine with one GPU."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.closed = False
        self.asked: list[int | str] = []

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.error

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.closed = True

    def nvmlSystemGetCudaDriverVersion_v2(self, out: Any) -> None:  # noqa: N802
        out._obj.value = 13010

    def nvmlSystemGetDriverVersion(self, out: Any, size: int) -> int:  # noqa: N802
        out.value = b"590.44"
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> None:  # noqa: N802
        out._obj.value = 1

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, out: Any) -> None:  # noqa: N802
        self.asked.append(index)
        out._obj.value = 7

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, out: Any) -> None:  # noqa: N802
        self.asked.append(bus.decode())
        out._obj.value = 7

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, out: Any) -> None:  # noqa: N802
        assert handle.value == 7
        out._obj.total, out._obj.free = 16 << 30, 15 << 30

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> None:  # noqa: N802
        major._obj.value, minor._obj.value = 12, 0

    def nvmlDeviceGetName(self, handle: Any, out: Any, size: int) -> int:  # noqa: N802
        out.value = b"NVIDIA GeForce RTX 5080"
        return 0


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "_opens", lambda codec, mode, gpu: codec in ("av1_cuvid", "hevc_nvenc")
    )
    library = FakeNvml()
    driver, cuda, (gpu,) = nvidia(library)
    assert (driver, cuda) == ("590.44", (13, 1))
    assert gpu == Gpu(
        name="NVIDIA GeForce RTX 5080",
        memory_bytes=16 << 30,
        free_bytes=15 << 30,
        capability=(12, 0),
        decoders=("av1",),
        encoders=("hevc",),
    )
    assert library.closed
    assert library.asked == [0]
    assert nvidia(FakeNvml(error=9)) == ("", (0, 0), ())


def test_gpus_are_those_that_cuda_sees_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    monkeypatch.setattr(machine, "_opens", lambda codec, mode, gpu: opened.append((codec, gpu)))
    buses = ["0000:81:00.0", "0000:01:00.0"]
    runtime = SimpleNamespace(
        getDeviceCount=lambda: len(buses), deviceGetPCIBusId=lambda index: buses[index]
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    library = FakeNvml()
    _, _, gpus = nvidia(library, machine._cuda_buses())
    assert library.asked == buses
    assert [gpu.index for gpu in gpus] == [0, 1]
    assert {gpu for _, gpu in opened} == {0, 1}  # FFmpeg counts as CUDA does
    buses.clear()
    assert nvidia(FakeNvml(), machine._cuda_buses())[2] == ()

    def refuse(status: int) -> int:
        raise OSError(status) if status != 100 else Refused

    class Refused(Exception):
        status = 100

    runtime.getDeviceCount = lambda: refuse(100)
    assert machine._cuda_buses() == []
    runtime.getDeviceCount = lambda: refuse(35)
    assert machine._cuda_buses() is None
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert machine._cuda_buses() is None


def test_each_gpu_has_its_own_device() -> None:
    facts = replace(ON_GPU, gpus=(GPU, replace(GPU, index=1)), providers=(CPU, CUDA))
    text = [line.split() for line in lines(facts)]
    asked = [words[1] for words in text if words[0] == "--device"]
    assert asked == ["cpu", "cuda", "cuda:1"]
    assert [d["device"] for d in listing(facts)["devices"]] == ["cpu", "cuda:0", "cuda:1"]


def test_a_codec_of_a_missing_gpu_does_not_open() -> None:
    assert not machine._opens("no_such_codec", "r", 0)
    if not nvidia()[2]:
        assert not machine._opens("h264_cuvid", "r", 0)
        assert not machine._opens("h264_nvenc", "w", 0)


def test_cards_are_read_from_the_kernel(tmp_path: Path) -> None:
    for name, vendor in (("card0", "0x8086"), ("card1", "0x10de"), ("card2", "0x1234")):
        (tmp_path / name / "device").mkdir(parents=True)
        (tmp_path / name / "device" / "vendor").write_text(vendor + "\n")
    assert machine._cards(tmp_path) == ("Intel (card0)", "0x1234 (card2)")


def test_the_list_of_devices() -> None:
    rtx = ProviderState(name="rtx", title="TensorRT for RTX", memory="cuda", installed=False,
                        problem="'x' is not installed", install="pip install x")  # fmt: skip
    facts = replace(ON_GPU, providers=(CPU, CUDA, rtx), cards=("Intel (card0)",))
    text = "\n".join(lines(facts))
    assert "NVIDIA Test, 80.0 GiB (79.0 free), compute capability 9.0, driver 580.65" in text
    assert "decodes h264, hevc" in text
    assert "encodes nothing" in text
    assert "pip install x" in text
    assert text.index("--device cpu") < text.index("NVIDIA Test") < text.index("--device cuda")
    found = listing(facts)
    assert [d["device"] for d in found["devices"]] == ["cpu", "cuda:0"]
    assert found["devices"][1]["providers"] == ["cuda"]
    json.dumps(found)


def test_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = CASES["two runtimes"][0]
    for facts, code in ((PLAIN, 0), (broken, 3), (CASES["codecs"][0], 0)):
        monkeypatch.setattr(machine, "gather", lambda facts=facts: facts)
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == code
        told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
        assert len(told["findings"]) == len(examine(facts))
    assert "nothing is wrong" not in done.stdout
    shown = CliRunner().invoke(app, ["devices"])
    assert "A processor, 2 cores, 8.0 GiB" in shown.stdout
    assert SimpleNamespace(**json.loads(CliRunner().invoke(app, ["devices", "--json"]).stdout))
