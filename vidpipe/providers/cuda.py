"""NVIDIA GPUs through CUDA and cuDNN: ONNX Runtime's own provider in `onnxruntime-gpu`."""

from __future__ import annotations

import importlib.util

from vidpipe.providers.base import Provider, Request


class _Cuda(Provider):
    name = "cuda"
    ep = "CUDAExecutionProvider"
    title = "CUDA"
    memory = "cuda"
    # Two ONNX Runtimes in one environment break each other.
    install = "pip uninstall -y onnxruntime && pip install 'vidpipe[cuda13]'"
    platforms = ("linux", "win")
    half = True
    widen = False
    graph_option = "enable_cuda_graph"
    graph_id = "gpu_graph_id"

    def installed(self) -> bool:
        """Return whether CuPy is there too, without which no frame gets to the GPU."""
        return super().installed() and importlib.util.find_spec("cupy") is not None

    def options(self, request: Request) -> dict[str, str]:
        return {
            "device_id": str(request.index),
            "prefer_nhwc": "1",
            "fuse_conv_bias": "1",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",
        }


PROVIDER = _Cuda()
