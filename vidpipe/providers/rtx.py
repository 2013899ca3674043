"""NVIDIA GeForce RTX through TensorRT for RTX: the wheel `onnxruntime-ep-nv-tensorrt-rtx-cu13`.

It takes compute capability 8.0, 8.6, 8.9 and 12.0 or later, so it refuses H100 and H200 (9.0).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from vidpipe.device import Device
from vidpipe.providers.base import Provider, Request


class _Rtx(Provider):
    name = "rtx"
    # Microsoft's catalogue spells it NvTensorRtRtx...
    ep = "NvTensorRTRTXExecutionProvider"
    title = "TensorRT for RTX"
    memory = "cuda"
    package = "onnxruntime_ep_nv_tensorrt_rtx"
    install = "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13 cupy-cuda13x"
    platforms = ("linux", "win")
    half = True
    widen = False
    graph_option = "enable_cuda_graph"
    graph_id = "cuda_graph_annotation_id"
    cache_option = "nv_runtime_cache_path"
    context = True
    # A build takes seconds: it is asked for by name until it can be measured on a card.
    candidate = False

    def options(self, request: Request) -> dict[str, str]:
        return {**super().options(request), "has_user_compute_stream": "1"}

    def prepare(self, package: Path) -> None:
        """Load the CUDA runtime beside the library: the wheels bundle it, and do not find it."""
        if sys.platform != "linux":
            return
        for library in sorted(package.glob("libcudart.so.*"))[-1:]:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def refuses(self, place: Device) -> str:
        """Say so when the GPU is of a kind that TensorRT for RTX has no kernels for."""
        capability = compute_capability(place)
        if capability is None or capability[0] == 8 or capability >= (12, 0):
            return ""
        return (
            f"TensorRT for RTX takes compute capability 8.x and 12.0 or later; "
            f"this GPU has {capability[0]}.{capability[1]}"
        )


def compute_capability(device: Device) -> tuple[int, int] | None:
    """Return a GPU's compute capability, or None where CuPy or the GPU is missing."""
    try:
        import cupy

        text = str(cupy.cuda.Device(device.index).compute_capability)
    except Exception:  # CuPy raises errors of many kinds without a driver
        return None
    return int(text[:-1]), int(text[-1])


PROVIDER = _Rtx()
