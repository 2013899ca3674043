"""ONNX Runtime's own CPU provider. Part of every ONNX Runtime."""

from __future__ import annotations

from typing import Any

from vidpipe.providers.base import Provider, Request


class _Cpu(Provider):
    name = "cpu"
    ep = "CPUExecutionProvider"
    kind = "cpu"
    title = "ONNX Runtime on the CPU"
    install = "pip install 'vidpipe[cpu]'"
    portable = False
    lanes = 2

    def configure(self, options: Any, request: Request) -> None:
        options.intra_op_num_threads = request.threads
        options.inter_op_num_threads = 1
        # Threads that spin answer sooner, and take the processor from the codecs.
        spin = str(int(request.prefer == "latency"))
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)


PROVIDER = _Cpu()
