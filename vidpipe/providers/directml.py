"""Any Direct3D 12 GPU on Windows through DirectML: part of `onnxruntime-windowsml`."""

from __future__ import annotations

from typing import Any

from vidpipe.providers.base import Provider, Request


class _DirectMl(Provider):
    name = "directml"
    ep = "DmlExecutionProvider"
    title = "DirectML"
    # Two ONNX Runtimes in one environment break each other.
    install = "pip uninstall -y onnxruntime && pip install 'vidpipe[windows]'"
    platforms = ("win",)

    def options(self, request: Request) -> dict[str, str]:
        return {"device_id": str(request.index)}

    def configure(self, options: Any, request: Request) -> None:  # noqa: ARG002
        options.enable_mem_pattern = False  # DirectML does not support it


PROVIDER = _DirectMl()
