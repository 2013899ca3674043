"""ONNX Runtime's module, and the processors it may use."""

from __future__ import annotations

import os
import re
from typing import Any

from vidpipe.errors import MissingExtraError

RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-windowsml")
"""Packages that install the module `onnxruntime`; only one can be there at a time."""

OFFLINE = "VIDPIPE_OFFLINE"
"""Environment variable that forbids downloads, as `--offline` does."""


def import_onnxruntime() -> Any:
    """Return the onnxruntime module, with its telemetry off.

    Raises:
        MissingExtraError: it is not installed.
    """
    # Read when the library is loaded; without it, usage is kept in a database to be sent.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu") from None
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def forbid_downloads() -> None:
    """Let nothing be fetched from a network, in this process and those that it starts."""
    os.environ[OFFLINE] = "1"


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads_for(prefer: str) -> int:
    """Return the threads of one operator: all processors, or half of them to save power."""
    count = default_threads()
    return max(1, count // 2) if prefer == "efficiency" else count


def first_line(error: Exception) -> str:
    """Return the first line of ONNX Runtime's message, without its code."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
