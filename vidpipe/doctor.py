"""What is wrong with an environment, and the line that mends it.

Every check is a function of `Facts` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vidpipe.machine import Facts
from vidpipe.providers.runtime import RUNTIMES

ENCODERS = ("libx264", "libx265", "libsvtav1", "aac", "libopus", "flac")
DECODERS = ("h264", "hevc", "libdav1d", "vp9", "mpeg2video", "aac", "ac3", "mp3")
"""What vidpipe counts on in PyAV's FFmpeg."""

LEAST_DRIVER = {12: 525, 13: 580}
"""Oldest driver branch for each CUDA major, by NVIDIA's compatibility table."""

WINDOWS_24H2 = 26100


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        level: "error" if models do not run as they should, else "warning".
        message: what is wrong, one line.
        mend: what to type or to do.
    """

    level: str
    message: str
    mend: str


def examine(facts: Facts) -> list[Finding]:
    """Return all that is wrong, errors first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: finding.level != "error")


def _runtimes(facts: Facts) -> Iterator[Finding]:
    there = [name for name in RUNTIMES if name in facts.packages]
    if len(there) > 1:
        keep = "onnxruntime-gpu" if facts.gpus and "onnxruntime-gpu" in there else there[-1]
        if "onnxruntime-windowsml" in there:
            keep = "onnxruntime-windowsml"
        yield Finding(
            "error",
            f"{' and '.join(there)} are both installed; they overwrite each other's files",
            f'pip uninstall -y {" ".join(there)} && pip install "{keep}=={facts.packages[keep]}"',
        )
    elif not facts.runtime:
        yield Finding(
            "error",
            f"ONNX Runtime does not load: {facts.runtime_error}"
            if there
            else "no ONNX Runtime is installed",
            f"pip install --force-reinstall {there[0]}" if there else "pip install 'vidpipe[cpu]'",
        )


def runtime_major(facts: Facts) -> int | None:
    """Return the CUDA major that `onnxruntime-gpu` was built for, or None without it.

    The wheels are for CUDA 12 up to 1.26 and for CUDA 13 from 1.27 on.
    """
    version = facts.packages.get("onnxruntime-gpu")
    if version is None:
        return None
    return 13 if _numbers(version) >= (1, 27) else 12


def cupy_majors(facts: Facts) -> list[int]:
    """Return the CUDA majors of the installed CuPy wheels."""
    found = (re.fullmatch(r"cupy-cuda(\d+)x", name) for name in facts.packages)
    return sorted(int(match[1]) for match in found if match)


def _cuda_majors(facts: Facts) -> Iterator[Finding]:
    majors, runtime = cupy_majors(facts), runtime_major(facts)
    if len(majors) > 1:
        wheels = [f"cupy-cuda{m}x" for m in majors]
        keep = runtime or majors[-1]
        yield Finding(
            "error",
            f"{' and '.join(wheels)} are both installed; they overwrite each other's files",
            f"pip uninstall -y {' '.join(wheels)} && pip install cupy-cuda{keep}x",
        )
    elif runtime is not None and majors and majors[0] != runtime:
        yield Finding(
            "error",
            f"cupy-cuda{majors[0]}x is for CUDA {majors[0]}, onnxruntime-gpu "
            f"{facts.packages['onnxruntime-gpu']} for CUDA {runtime}",
            f"pip uninstall -y cupy-cuda{majors[0]}x && pip install 'vidpipe[cuda{runtime}]'",
        )
    elif runtime is not None and facts.gpus and not majors:
        yield Finding(
            "error",
            "CuPy is not installed, so no frame gets to the GPU",
            f"pip install 'vidpipe[cuda{runtime}]'",
        )
    elif facts.gpus and majors and facts.cupy_error:
        yield Finding(
            "error",
            f"CuPy cannot use the GPU: {facts.cupy_error}",
            f"pip install --force-reinstall cupy-cuda{majors[0]}x",
        )


def _libraries(facts: Facts) -> Iterator[Finding]:
    if runtime_major(facts) is None or not facts.gpus:
        return
    missing = [name for name in ("cublas", "cudnn") if name not in facts.libraries]
    if missing:
        names = {"cublas": "cuBLAS", "cudnn": "cuDNN"}
        yield Finding(
            "error",
            f"{' and '.join(names[m] for m in missing)}, which the CUDA provider loads, "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            f'pip install "onnxruntime-gpu[cuda,cudnn]=={facts.packages["onnxruntime-gpu"]}"',
        )


def _driver(facts: Facts) -> Iterator[Finding]:
    needed = runtime_major(facts) or max(cupy_majors(facts), default=None)
    if needed is None:
        return
    if not facts.gpus:
        yield Finding(
            "warning",
            "packages for CUDA are installed, but no NVIDIA driver with a GPU answers",
            "Install NVIDIA's driver, or pip install 'vidpipe[cpu]' in a fresh environment",
        )
    elif facts.driver_cuda[0] < needed:
        least = LEAST_DRIVER.get(needed, LEAST_DRIVER[13])
        older = " or pip install 'vidpipe[cuda12]'" if needed == 13 else ""
        yield Finding(
            "error",
            f"driver {facts.driver} runs CUDA up to {facts.driver_cuda[0]}."
            f"{facts.driver_cuda[1]}; the installed packages are for CUDA {needed}",
            f"Update the driver to {least} or later,{older}" if older else f"Update to {least}",
        )


def _unused_gpu(facts: Facts) -> Iterator[Finding]:
    ready = any(p.memory == "cuda" and p.devices for p in facts.providers)
    if facts.gpus and runtime_major(facts) is None and facts.runtime and not ready:
        extra = "cuda13" if facts.driver_cuda[0] >= 13 else "cuda12"
        others = " ".join(name for name in RUNTIMES if name in facts.packages)
        yield Finding(
            "warning",
            f"{facts.gpus[0].name} is here, but the installed ONNX Runtime is for the CPU",
            f"pip uninstall -y {others} && pip install 'vidpipe[{extra}]'",
        )


def _drm(facts: Facts) -> Iterator[Finding]:
    plug_ins = [
        p.title for p in facts.providers if p.installed and p.name in ("rtx", "webgpu", "openvino")
    ]
    if not facts.drm and plug_ins and (facts.gpus or facts.cards):
        yield Finding(
            "warning",
            f"/sys/class/drm is not there, so {', '.join(plug_ins)} find no GPU; CUDA does not "
            "need it",
            "Start the container with --device /dev/dri, or use --device cuda",
        )


def _providers(facts: Facts) -> Iterator[Finding]:
    if not facts.runtime:
        return
    for state in facts.providers:
        plug_in = state.name not in ("cpu", "cuda", "directml")
        if plug_in and state.here and state.installed and not state.devices:
            yield Finding(
                "warning",
                f"{state.title} is installed but cannot be used: {state.problem}",
                f"See docs/providers.md, or try {state.install.replace('install', 'install -U')}",
            )


def _codecs(facts: Facts) -> Iterator[Finding]:
    if not facts.codecs:
        yield Finding("error", "PyAV does not load", "pip install --force-reinstall av")
        return
    missing = [name for name in (*ENCODERS, *DECODERS) if name not in facts.codecs]
    if missing:
        yield Finding(
            "warning",
            f"PyAV's FFmpeg lacks {', '.join(missing)}",
            "pip install --force-reinstall --only-binary av av",
        )


def _windows(facts: Facts) -> Iterator[Finding]:
    if "windowsml" in facts.packages and 0 < facts.build < WINDOWS_24H2:
        yield Finding(
            "warning",
            f"Windows build {facts.build} has no catalogue of execution providers",
            "Update to Windows 11 24H2, or pip install 'vidpipe[rtx]'",
        )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _runtimes,
    _cuda_majors,
    _libraries,
    _driver,
    _unused_gpu,
    _drm,
    _providers,
    _codecs,
    _windows,
)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
