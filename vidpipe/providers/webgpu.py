"""Any GPU with Vulkan, Direct3D 12 or Metal, through WebGPU: `onnxruntime-ep-webgpu`."""

from __future__ import annotations

import ctypes.util
import sys

from vidpipe.providers.base import Provider


class _WebGpu(Provider):
    name = "webgpu"
    ep = "WebGpuExecutionProvider"
    title = "WebGPU"
    package = "onnxruntime_ep_webgpu"
    install = "pip install onnxruntime-ep-webgpu"

    def no_device(self) -> str:
        if sys.platform == "linux" and ctypes.util.find_library("vulkan") is None:
            return "the Vulkan loader, libvulkan.so.1, is not installed"
        return super().no_device()


PROVIDER = _WebGpu()
