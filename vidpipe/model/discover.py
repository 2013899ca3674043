"""Which devices this machine offers to models."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil

from vidpipe.model.session import default_threads, import_onnxruntime


def available_devices() -> list[dict[str, Any]]:
    """Return the devices with their execution providers.

    Each has: device (what `--device` takes), name, cores, memory_bytes, runtime, providers.

    Raises:
        MissingExtraError: no ONNX Runtime is installed.
    """
    ort = import_onnxruntime()
    providers = [p for p in ort.get_available_providers() if p == "CPUExecutionProvider"]
    return [
        {
            "device": "cpu",
            "name": _processor_name(),
            "cores": default_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "runtime": f"onnxruntime {ort.__version__}",
            "providers": providers,
        }
    ]


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
