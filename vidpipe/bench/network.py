"""A network alone: ONNX Runtime in a plain loop over bound buffers.

The model's own file, of static size, with float input and output; none of the nodes for
colour, chroma and rounding, no stage, no pipeline. On a GPU in float16, as the pipeline runs
it, and as one CUDA graph. It is what other programs' figures of a network mean.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper

from vidpipe.bench.rig import Burst, Moment
from vidpipe.clock import Clock, MonotonicClock, processor_s
from vidpipe.device import CPU, Device, import_cupy, setup_lock
from vidpipe.model.compile import load_static
from vidpipe.model.descriptor import Descriptor
from vidpipe.model.precision import narrow_graph
from vidpipe.model.session import CPU_PROVIDER, default_threads, import_onnxruntime
from vidpipe.providers.base import Request
from vidpipe.providers.cuda import PROVIDER

_EAGER, _GRAPH = "-1", "1"


class Network:
    """A model's file, loaded and bound once.

    Args:
        model: what to run.
        width, height: of its input, in pixels; rounded up to the model's multiple.
        device: where.
        clock: times the bursts.

    Attributes:
        graph: whether it is replayed as a CUDA graph.

    Raises:
        MissingExtraError: ONNX Runtime or CuPy is not installed.
    """

    def __init__(
        self, model: Descriptor, width: int, height: int, device: Device, clock: Clock | None = None
    ) -> None:
        self.model = model
        self._clock = clock or MonotonicClock()
        self._ort = import_onnxruntime()
        multiple = model.multiple
        width, height = model.size or (math.ceil(n / multiple) * multiple for n in (width, height))
        proto = load_static(model, width, height, widen=device == CPU)
        if device != CPU:
            narrow_graph(proto.graph)
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if device == CPU:
            self._stream: Any = None
            options.intra_op_num_threads = default_threads()
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            providers: list[Any] = [CPU_PROVIDER]
        else:
            cupy = import_cupy(device)
            self._stream = cupy.cuda.Stream(non_blocking=True)
            cuda = PROVIDER.options(Request(index=device.index))
            cuda |= {"user_compute_stream": str(self._stream.ptr), PROVIDER.graph_option: "1"}
            providers = [(PROVIDER.ep, cuda)]
        self._session = self._ort.InferenceSession(
            proto.SerializeToString(), options, providers=providers, enable_fallback=0
        )
        self._binding = self._session.io_binding()
        self._buffers: list[Any] = []
        self._bind(proto, width, height, device)
        self._options = {name: self._run_options(name, device) for name in (_EAGER, _GRAPH)}
        self.graph = False
        if device != CPU:
            with setup_lock:
                self.graph = self._capture()

    def _capture(self) -> bool:
        self._launch(_EAGER)
        try:
            for _ in range(2):
                self._launch(_GRAPH)
        except Exception:  # ONNX Runtime's exceptions share no base class
            return False
        self._stream.synchronize()
        return True

    def _bind(self, proto: onnx.ModelProto, width: int, height: int, device: Device) -> None:
        model = self.model
        scale = model.scale
        values = {v.name: v for v in (*proto.graph.input, *proto.graph.output)}
        for name, h, w, bind in (
            (model.input, height, width, self._binding.bind_input),
            (model.output, height * scale, width * scale, self._binding.bind_output),
        ):
            kind = values[name].type.tensor_type.elem_type
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            shape: tuple[int, ...] = (1, model.plane_count, h, w)
            if model.layout == "NHWC":
                shape = (1, h, w, model.plane_count)
            bind(name, device.kind, device.index, dtype, shape, self._buffer(shape, dtype, device))
        if model.strength is not None:
            type_ = values[model.strength].type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(type_.elem_type)
            shape = tuple(d.dim_value or 1 for d in type_.shape.dim)
            address = self._buffer(shape, dtype, device)
            bind = self._binding.bind_input
            bind(model.strength, device.kind, device.index, dtype, shape, address)

    def _buffer(self, shape: tuple[int, ...], dtype: Any, device: Device) -> int:
        """Allocate a tensor of noise and return its address."""
        values = np.asarray(np.random.default_rng(0).random(shape, np.float32), dtype)
        if device == CPU:
            self._buffers.append(values)
            return int(values.ctypes.data)
        array = import_cupy(device).asarray(values)
        self._buffers.append(array)
        return int(array.data.ptr)

    def _run_options(self, graph: str, device: Device) -> Any:
        options = self._ort.RunOptions()
        if device != CPU:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            options.add_run_config_entry(PROVIDER.graph_id, graph)
        return options

    def _launch(self, name: str) -> None:
        self._session.run_with_iobinding(self._binding, self._options[name])

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def burst(self, frames: int, *, graph: bool = True) -> Burst:
        """Run it so many times after a short lead-in, and time these."""
        name = _GRAPH if graph and self.graph else _EAGER
        for _ in range(max(1, min(32, frames // 3))):
            self._launch(name)
        self._finish()
        begin, begin_s = Moment(self._clock.now_s()), processor_s()
        for _ in range(frames):
            self._launch(name)
        self._finish()
        used_s = processor_s() - begin_s
        return Burst(frames, begin, Moment(self._clock.now_s()), used_s / frames)

    def close(self) -> None:
        """Let go of the memory."""
        self._finish()
        self._session = self._binding = None
        self._buffers.clear()
