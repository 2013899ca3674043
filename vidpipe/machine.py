"""What this machine and this environment have: processors, drivers, packages, codecs.

`gather` asks; nothing here judges. `vidpipe.doctor` says what is wrong, `vidpipe devices`
prints the rest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from vidpipe.errors import DeviceError
from vidpipe.model.choose import processor_name
from vidpipe.providers import all_providers
from vidpipe.providers.base import Provider, all_devices, device_kind, find
from vidpipe.providers.runtime import default_threads, first_line, import_onnxruntime

DECODERS = ("h264", "hevc", "av1", "vp9", "mpeg2", "mjpeg")
"""Codecs that GPUs decode, by FFmpeg's name without the suffix."""

ENCODERS = ("h264", "hevc", "av1")

LIBRARIES = ("cublas", "cudnn", "curand", "cudart")
"""CUDA libraries that ONNX Runtime's CUDA provider loads."""

_NO_DEVICE = 100
"""What CUDA answers where it shows a process no GPU: cudaErrorNoDevice."""

_VENDORS = {0x8086: "Intel", 0x1002: "AMD", 0x10DE: "NVIDIA", 0x5143: "Qualcomm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU, as its driver describes it.

    Attributes:
        index: CUDA's ordinal, as in "cuda:1"; the driver's where CuPy is missing.
        name: of the chip or card.
        memory_bytes, free_bytes: all of its memory, and what is free now.
        capability: CUDA compute capability, (major, minor).
        decoders, encoders: codecs that NVDEC and NVENC took in a real attempt.
    """

    index: int = 0
    name: str = ""
    memory_bytes: int = 0
    free_bytes: int = 0
    capability: tuple[int, int] = (0, 0)
    decoders: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderState:
    """Whether an execution provider can be used.

    Attributes:
        name: what `--device` takes.
        title: for people.
        memory: where its frames are, "cpu" or "cuda".
        devices: kinds of its devices, such as ("cpu", "gpu"); empty if it cannot be used.
        installed: whether its files are there.
        here: whether it exists for this operating system.
        problem: why it cannot be used, or "".
        install: the line that installs it.
    """

    name: str
    title: str
    memory: str = "cpu"
    devices: tuple[str, ...] = ()
    installed: bool = False
    here: bool = True
    problem: str = ""
    install: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known about the machine and the environment.

    Attributes:
        system: `sys.platform`; `build` is Windows' build number, or 0.
        packages: versions of what is installed, by the package's name in lower case.
        runtime: version of ONNX Runtime, or "" with the reason in `runtime_error`.
        available: what it lists in `get_available_providers()`.
        processor, cores, memory_bytes: of the CPU; cores that this process may use.
        gpus: NVIDIA GPUs; `cards`: other display adapters, by their vendor.
        driver: NVIDIA's driver, such as "580.65"; `driver_cuda`: newest CUDA it runs.
        drm: whether /sys/class/drm is there; True where that does not matter.
        libraries: CUDA libraries that are found.
        cupy_error: why CuPy does not import, or "".
        codecs: names of FFmpeg's encoders and decoders, as PyAV has them.
        providers: every known provider.
    """

    system: str = "linux"
    build: int = 0
    packages: Mapping[str, str] = field(default_factory=dict)
    runtime: str = ""
    runtime_error: str = ""
    available: tuple[str, ...] = ()
    processor: str = ""
    cores: int = 1
    memory_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    cards: tuple[str, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] = (0, 0)
    drm: bool = True
    libraries: frozenset[str] = frozenset()
    cupy_error: str = ""
    codecs: frozenset[str] = frozenset()
    providers: tuple[ProviderState, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {
            **asdict(self),
            "packages": dict(self.packages),
            "libraries": sorted(self.libraries),
            "codecs": sorted(self.codecs),
        }


def gather() -> Facts:
    """Ask the system, the drivers and the packages. Takes a second or two."""
    import psutil

    runtime, error, available, ort = "", "", (), None
    try:
        ort = import_onnxruntime()
        runtime, available = str(ort.__version__), tuple(ort.get_available_providers())
    except Exception as failure:  # also a library that does not load
        error = first_line(failure)
    driver, driver_cuda, gpus = nvidia(buses=_cuda_buses())
    packages = installed_packages()
    states = [state_of(p, ort) for p in all_providers()]
    if not gpus:
        gone = "no NVIDIA driver with a GPU answers"
        states = [
            replace(s, devices=(), problem=gone) if s.memory == "cuda" and s.devices else s
            for s in states
        ]
    return Facts(
        system=sys.platform,
        build=int(platform.version().rpartition(".")[2]) if sys.platform == "win32" else 0,
        packages=packages,
        runtime=runtime,
        runtime_error=error,
        available=available,
        processor=processor_name(),
        cores=default_threads(),
        memory_bytes=int(psutil.virtual_memory().total),
        gpus=gpus,
        cards=_cards(),
        driver=driver,
        driver_cuda=driver_cuda,
        drm=sys.platform != "linux" or Path("/sys/class/drm").is_dir(),
        libraries=_libraries(packages),
        cupy_error=_cupy_error() if gpus else "",
        codecs=_codecs(),
        providers=tuple(states),
    )


def state_of(provider: Provider, ort: Any) -> ProviderState:
    """Return whether a provider can be used, registering its library to find out.

    Args:
        provider: its description.
        ort: the onnxruntime module, or None where it does not load.
    """
    devices: tuple[str, ...] = ()
    problem = ""
    try:
        if ort is None:
            raise DeviceError("ONNX Runtime does not load")
        if provider.package is None:
            devices = (find(provider, ort).kind,)
        elif provider.name == "winml":
            devices = _catalogue(provider)
        else:
            find(provider, ort)
            devices = tuple(sorted({device_kind(d) for d in all_devices(provider, ort)}))
    except DeviceError as error:
        problem = error.message
    return ProviderState(
        name=provider.name,
        title=provider.title,
        memory=provider.memory,
        devices=devices,
        installed=provider.installed(),
        here=provider.here(),
        problem=problem,
        install=provider.install,
    )


def _catalogue(provider: Provider) -> tuple[str, ...]:
    from vidpipe.providers.winml import catalogue_entries

    if not provider.here():
        raise DeviceError(f"{provider.title} does not exist for this operating system")
    if not provider.installed():
        raise DeviceError(f"'{provider.package}' is not installed")
    return tuple(name for name, _, _ in catalogue_entries())


def installed_packages() -> dict[str, str]:
    """Return the versions of all packages of this environment, by name in lower case."""
    return {
        re.sub(r"[-_.]+", "-", str(d.metadata["Name"])).lower(): d.version
        for d in distributions()
        if d.metadata["Name"]
    }


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _cuda_buses() -> list[str] | None:
    """Return the PCI address of every GPU that CUDA shows this process, in its order.

    None where CuPy does not work: nothing is known then of CUDA's order.
    """
    try:
        from cupy.cuda import runtime

        return [str(runtime.deviceGetPCIBusId(i)) for i in range(runtime.getDeviceCount())]
    except Exception as error:  # also a library that does not load
        return [] if getattr(error, "status", None) == _NO_DEVICE else None


def nvidia(
    library: Any = None, buses: Sequence[str] | None = None
) -> tuple[str, tuple[int, int], tuple[Gpu, ...]]:
    """Ask NVIDIA's management library (NVML), which comes with the driver.

    Args:
        library: the loaded library; by default the system's.
        buses: PCI addresses of the GPUs to ask about; all that the driver has if not given.

    Returns:
        The driver's version, the newest CUDA that it runs, and the GPUs; empty without one.
    """
    nothing: tuple[str, tuple[int, int], tuple[Gpu, ...]] = ("", (0, 0), ())
    if library is None:
        try:
            library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        except OSError:
            return nothing
    if library.nvmlInit_v2():
        return nothing
    try:
        version, count = ctypes.c_int(), ctypes.c_uint()
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        places: Sequence[int | str] = range(count.value) if buses is None else buses
        gpus = tuple(_gpu(library, index, place) for index, place in enumerate(places))
        cuda = (version.value // 1000, version.value % 1000 // 10)
        return _text(library.nvmlSystemGetDriverVersion), cuda, gpus
    finally:
        library.nvmlShutdown()


def _text(ask: Callable[..., int], *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(96)
    return "" if ask(*arguments, buffer, 96) else buffer.value.decode()


def _gpu(library: Any, index: int, place: int | str) -> Gpu:
    handle, memory = ctypes.c_void_p(), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if isinstance(place, str):
        library.nvmlDeviceGetHandleByPciBusId_v2(place.encode(), ctypes.byref(handle))
    else:
        library.nvmlDeviceGetHandleByIndex_v2(place, ctypes.byref(handle))
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        index=index,
        name=_text(library.nvmlDeviceGetName, handle),
        memory_bytes=int(memory.total),
        free_bytes=int(memory.free),
        capability=(major.value, minor.value),
        decoders=tuple(c for c in DECODERS if _opens(f"{c}_cuvid", "r", index)),
        encoders=tuple(c for c in ENCODERS if _opens(f"{c}_nvenc", "w", index)),
    )


def _opens(codec: str, mode: str, gpu: int) -> bool:
    """Return whether a codec of the GPU can really be opened: FFmpeg asks the driver then."""
    from fractions import Fraction

    import av

    if codec not in av.codecs_available:
        return False
    try:
        context: Any = av.CodecContext.create(codec, mode)  # type: ignore[call-overload]
        context.width, context.height = 640, 480
        context.options = {"gpu": str(gpu)}
        if mode == "w":
            context.pix_fmt, context.time_base = "nv12", Fraction(1, 25)
        context.open()
    except Exception:  # PyAV has an error class for each of FFmpeg's codes, and its own
        return False
    return True


def _cards(folder: Path = Path("/sys/class/drm")) -> tuple[str, ...]:
    """Return display adapters that are not NVIDIA's, by the kernel's list."""
    found = []
    for path in sorted(folder.glob("card*/device/vendor")):
        with suppress(OSError, ValueError):
            vendor = int(path.read_text().strip(), 16)
            if vendor != 0x10DE:
                found.append(f"{_VENDORS.get(vendor, hex(vendor))} ({path.parts[-3]})")
    return tuple(dict.fromkeys(found))


def _libraries(packages: Mapping[str, str]) -> frozenset[str]:
    """Return which of `LIBRARIES` are there, as a package or in the system's path."""
    wheels = {"cublas": "cublas", "cudnn": "cudnn", "curand": "curand", "cudart": "cuda-runtime"}
    return frozenset(
        name
        for name in LIBRARIES
        if any(re.match(rf"nvidia-{wheels[name]}(-cu\d+)?$", p) for p in packages)
        or ctypes.util.find_library(name)
    )


def _cupy_error() -> str:
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # also a library that does not load
        return first_line(error)
    return ""


def _codecs() -> frozenset[str]:
    try:
        import av
    except ImportError:
        return frozenset()
    return frozenset(av.codecs_available)
