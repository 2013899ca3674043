"""What figures were measured on: processor, GPU, driver, versions, clocks."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import psutil

import vidpipe
from vidpipe.device import CPU, Device, import_cupy
from vidpipe.model.choose import processor_name

_PACKAGES = (
    *("av", "numpy", "onnx"),
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-windowsml"),
    *("cupy-cuda12x", "cupy-cuda13x"),
)
_SMI = (
    *("name", "driver_version", "pstate", "temperature.gpu", "power.draw"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)


def machine_facts(device: Device) -> dict[str, Any]:
    """Return the machine's facts, JSON-compatible.

    Keys: "vidpipe", "python", "system", "processor", "cores" (that this process may use),
    "memory_bytes", "versions" (of the packages that are installed, and "ffmpeg", its
    libraries) and, with a GPU, "gpu": its name, memory, compute capability, driver, CUDA
    runtime, and what nvidia-smi says, where there is one.
    """
    from vidpipe.model.session import default_threads

    facts: dict[str, Any] = {
        "vidpipe": vidpipe.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": default_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": _versions(),
    }
    if device != CPU:
        facts["gpu"] = _gpu(device)
    return facts


def _versions() -> dict[str, Any]:
    import av

    found: dict[str, Any] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["ffmpeg"] = {
        name: ".".join(map(str, version)) for name, version in av.library_versions.items()
    }
    return found


def _gpu(device: Device) -> dict[str, Any]:
    cupy = import_cupy(device)
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(device.index)
    name = properties["name"]
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": int(properties["multiProcessorCount"]),
        "cuda_driver": _version(runtime.driverGetVersion()),
        "cuda_runtime": _version(runtime.runtimeGetVersion()),
        "nvidia_smi": smi(device),
    }


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def smi(device: Device) -> dict[str, str] | None:
    """Return what nvidia-smi says of a GPU now, or None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--id={device.index}", f"--query-gpu={','.join(_SMI)}"]
    try:
        ended = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in ended.stdout.strip().split(",")]
    return dict(zip(_SMI, values, strict=False))
