"""Intel processors, GPUs and NPUs through OpenVINO: the wheel `onnxruntime-ep-openvino`."""

from __future__ import annotations

import json

from vidpipe.providers.base import Provider, Request


class _OpenVino(Provider):
    name = "openvino"
    ep = "OpenVINOExecutionProvider"
    kind = "cpu"
    title = "OpenVINO"
    package = "onnxruntime_ep_openvino"
    install = "pip install onnxruntime-ep-openvino"
    platforms = ("linux", "win")
    context = True

    def options(self, request: Request) -> dict[str, str]:
        # One frame is run at a time, so streams that run several would only share the cores.
        settings: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY"}
        if request.kind == "cpu":
            settings |= {
                "INFERENCE_NUM_THREADS": request.threads,
                # Left alone, it computes in bfloat16 where the processor can.
                "INFERENCE_PRECISION_HINT": "f32",
                # Pinned threads would hold cores that the codecs need too.
                "ENABLE_CPU_PINNING": request.prefer == "latency",
            }
        return {"load_config": json.dumps({request.kind.upper(): settings})}

    def no_device(self) -> str:
        return "it lists Intel devices, and GPUs and NPUs only with their drivers"


PROVIDER = _OpenVino()
