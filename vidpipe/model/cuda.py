"""Sessions on CuPy arrays: ONNX Runtime on an NVIDIA GPU, on a stream of our own.

The input planes are copied on the device into buffers that never move, and each ring slot's
output planes are bound once. So one CUDA graph can be captured for each slot, all before the
first frame, and a frame costs a copy and a replay. Nothing here waits for the GPU while
frames flow; on the first real frame alone, the replay is compared with a run without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vidpipe.device import Device, Event, Stream, import_cupy
from vidpipe.errors import DeviceError, DeviceMemoryError, ModelError
from vidpipe.frame import Array
from vidpipe.model import context
from vidpipe.model.cache import Cache
from vidpipe.model.compile import Compiled
from vidpipe.model.session import first_line, import_onnxruntime
from vidpipe.providers import Target
from vidpipe.providers.base import Found, Request

_EAGER = "-1"
_TIMED_RUNS = 10
# Both run the same kernels. Where the GPU takes longer than the launches, which a graph spares the
# host, their times differ by chance alone.
_NOT_SLOWER = 1.02


@dataclass(frozen=True, slots=True)
class GraphUse:
    """What became of a session's CUDA graphs.

    Attributes:
        used: whether frames are replayed.
        reason: why not, or "".
        eager_ms, replay_ms: median time of a run at start, or None.
    """

    used: bool
    reason: str = ""
    eager_ms: float | None = None
    replay_ms: float | None = None


class CudaSession:
    """A compiled graph on an NVIDIA GPU; a `Session` for CuPy arrays.

    Args:
        compiled: the graph.
        device: the GPU. The calling thread is the one that will run it.
        stream: the stream that every run is queued on.
        found: the execution provider; CUDA's own if not given.
        strength: first value of the strength input, where the model has one.
        graph: capture and replay CUDA graphs, where that proves equal and no slower.
        memory_bytes: the most that the provider may allocate; None for all there is.
        name: of the model, for who looks into the cache.

    Attributes:
        inputs: the arrays that every run reads, of `Compiled.inputs`, contiguous.
        graph: what became of the CUDA graphs.
        note: one line about the cache of compiled models, or "".

    Raises:
        MissingExtraError: ONNX Runtime or CuPy is not installed.
        ModelError: ONNX Runtime cannot run the graph.
        DeviceError: a part of the graph would not run on the GPU, or it is out of memory.
    """

    def __init__(
        self,
        compiled: Compiled,
        *,
        device: Device,
        stream: Any,
        found: Found | None = None,
        strength: float | None = None,
        graph: bool = True,
        memory_bytes: int | None = None,
        name: str = "",
    ) -> None:
        found = found or Target.of(device).find()
        provider = found.provider
        self._ort = ort = import_onnxruntime()
        self._cupy = cupy = import_cupy(device)
        self.compiled = compiled
        self.device = device
        self._stream = stream
        self._provider = provider
        self.graph = GraphUse(graph, "" if graph else "switched off")
        self.note = ""
        # It tells of every session that it found no plug-in for its own provider.
        ort.set_default_logger_severity(3)
        request = Request(index=device.index, kind="gpu")
        graph_bytes = compiled.proto.SerializeToString()
        facts = context.facts_for(found, graph_bytes, request, name) if provider.keeps else {}
        if provider.cache_option:
            request = replace(request, cache=Cache().folder_for(context.RUNTIME_KIND, facts))
        provider_options = {
            **provider.options(request),
            "user_compute_stream": str(stream.ptr),
            provider.graph_option: str(int(graph)),
        }
        if memory_bytes is not None and found.device is None:
            provider_options["gpu_mem_limit"] = str(memory_bytes)

        def attached() -> tuple[Any, dict[str, Any]]:
            options = _session_options(ort)
            return options, found.attach(options, provider_options)

        def load(source: bytes | str) -> Any:
            options, asked = attached()
            return ort.InferenceSession(source, options, enable_fallback=0, **asked)

        try:
            if provider.context:
                kept = context.load(Cache(), graph_bytes, facts, load, lambda: attached()[0])
                self._session, self.note = kept.session, kept.note
            else:
                self._session = load(graph_bytes)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise _error(error, device) from None
        used = self._session.get_providers()
        if found.ep.lower() not in (name.lower() for name in used):
            raise DeviceError(
                f"asked for {found.ep}, got {', '.join(used)}",
                hint="See vidpipe doctor, or use --device cpu",
            )
        with stream:
            self.inputs = [cupy.zeros(t.plane_shape, t.dtype) for t in compiled.inputs]
            self._strength = cupy.zeros(compiled.strength_shape or (1,), np.float32)
        self._pending_strength = strength
        self._bindings: dict[int, Any] = {}
        self._outputs: dict[int, Sequence[Array]] = {}
        self._captured: set[int] = set()
        self._verified = False
        self._eager_options = self._run_options(_EAGER)
        self._options: dict[int, Any] = {}

    def _run_options(self, graph_id: str) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.graph.used:
            options.add_run_config_entry(self._provider.graph_id, graph_id)
        return options

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """See `Session.bind`."""
        binding = self._session.io_binding()
        index = self.device.index
        for tensor, plane in zip(self.compiled.outputs, outputs, strict=True):
            assert plane.shape == tensor.plane_shape, (plane.shape, tensor.plane_shape)
            assert plane.dtype == tensor.dtype, (plane.dtype, tensor.dtype)
            assert plane.flags.c_contiguous
            binding.bind_output(
                tensor.name, "cuda", index, tensor.dtype, tensor.shape, plane.data.ptr
            )
        for tensor, buffer in zip(self.compiled.inputs, self.inputs, strict=True):
            binding.bind_input(
                tensor.name, "cuda", index, tensor.dtype, tensor.shape, buffer.data.ptr
            )
        if self.compiled.strength is not None:
            value = self._strength
            binding.bind_input(
                self.compiled.strength,
                "cuda",
                index,
                value.dtype,
                self.compiled.strength_shape,
                value.data.ptr,
            )
        self._bindings[slot] = binding
        self._outputs[slot] = outputs

    def prepare(self) -> GraphUse:
        """Run every bound slot once, capture its graph, and see that the graphs are worth it.

        To be called before the first frame, by the thread that will call `run`, with
        `vidpipe.device.setup_lock` held.

        Returns:
            Whether frames will be replayed.

        Raises:
            ModelError, DeviceError: the graph does not run.
        """
        cupy, stream = self._cupy, self._stream
        with stream:
            self._fill_inputs()
            self._apply_strength()
        slots = sorted(self._bindings)
        for slot in slots:
            self._launch(slot, self._eager_options)
        stream.synchronize()
        if not self.graph.used:
            return self.graph
        for slot in slots:
            with stream:
                expected = [plane.copy() for plane in self._outputs[slot]]
                for plane in self._outputs[slot]:
                    plane.fill(0)
            self._options[slot] = self._run_options(str(slot + 1))
            try:
                self._launch(slot, self._options[slot])
                self._launch(slot, self._options[slot])
                stream.synchronize()
            except (ModelError, DeviceError) as error:
                return self._without_graph(f"capture failed: {error.message}")
            self._captured.add(slot)
            if not self._equal(expected, self._outputs[slot]):
                return self._without_graph("the replay differs from the run without a graph")
        eager_ms, replay_ms = self._timings(slots[0])
        self.graph = GraphUse(True, "", eager_ms, replay_ms)
        if replay_ms > _NOT_SLOWER * eager_ms:
            return self._without_graph("the replay is slower")
        # Scratch memory of the comparison goes back before the frames begin.
        cupy.get_default_memory_pool().free_all_blocks()
        return self.graph

    def _fill_inputs(self) -> None:
        """Write a picture with detail in it, the same at every start."""
        random = np.random.default_rng(0)
        for tensor, buffer in zip(self.compiled.inputs, self.inputs, strict=True):
            if tensor.dtype.kind == "f":
                values = random.random(tensor.plane_shape, np.float32).astype(tensor.dtype)
            else:
                top = np.iinfo(tensor.dtype).max
                values = random.integers(0, top, tensor.plane_shape, tensor.dtype, endpoint=True)
            buffer.set(values, stream=self._stream)

    def _timings(self, slot: int) -> tuple[float, float]:
        """Return the median time of a run without and with its graph, in ms."""
        cupy, stream = self._cupy, self._stream
        times = []
        for _ in range(_TIMED_RUNS):
            for options in (self._eager_options, self._options[slot]):
                begin, end = cupy.cuda.Event(), cupy.cuda.Event()
                begin.record(stream)
                self._launch(slot, options)
                end.record(stream)
                end.synchronize()
                times.append(cupy.cuda.get_elapsed_time(begin, end))
        return float(np.median(times[::2])), float(np.median(times[1::2]))

    def _without_graph(self, reason: str) -> GraphUse:
        self._options.clear()
        self.graph = GraphUse(False, reason, self.graph.eager_ms, self.graph.replay_ms)
        return self.graph

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """See `Session.run`; `stream` is the one the session was made with."""
        assert stream is self._stream
        queue: Any = self._stream
        for plane, buffer in zip(inputs, self.inputs, strict=True):
            copy_plane(self._cupy, plane, buffer, queue)
        self.launch(slot)
        event: Event = queue.record()
        return event

    def launch(self, slot: int) -> None:
        """Queue one run from what `inputs` hold then to a bound slot's planes."""
        self._apply_strength()
        if not self._verified:
            self._verify(slot)
        self._launch(slot, self._options.get(slot, self._eager_options))

    def _verify(self, slot: int) -> None:
        """Compare a slot's replay with a run without a graph, on the frame that is there."""
        self._verified = True
        if slot not in self._options:
            return
        self._launch(slot, self._eager_options)
        with self._stream:
            expected = [plane.copy() for plane in self._outputs[slot]]
        self._launch(slot, self._options[slot])
        if not self._equal(expected, self._outputs[slot]):
            self._without_graph("the replay differs from the run without a graph")

    def _equal(self, first: Sequence[Array], second: Sequence[Array]) -> bool:
        with self._stream:
            return all(
                bool(self._cupy.array_equal(a, b)) for a, b in zip(first, second, strict=True)
            )

    def _launch(self, slot: int, options: Any) -> None:
        try:
            self._session.run_with_iobinding(self._bindings[slot], options)
        except Exception as error:  # see above
            raise _error(error, self.device) from None

    def _apply_strength(self) -> None:
        value, self._pending_strength = self._pending_strength, None
        if value is not None:
            with self._stream:
                self._strength.fill(value)

    def set_strength(self, value: float) -> None:
        """See `Session.set_strength`."""
        self._pending_strength = value

    def nodes_by_provider(self) -> dict[str, int]:
        """See `Session.nodes_by_provider`."""
        counts: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        return counts

    def close(self) -> None:
        """See `Session.close`; waits for what is queued."""
        if self._session is not None:
            self._stream.synchronize()
        self._bindings.clear()
        self._outputs.clear()
        self._options.clear()
        self._session = None


def copy_plane(cupy: Any, source: Array, target: Array, stream: Any) -> None:
    """Queue a copy of a plane, of any row pitch, into a contiguous one."""
    runtime = cupy.cuda.runtime
    row = target.strides[0]
    if source.ndim == 0 or source.strides[1:] != target.strides[1:]:
        with stream:
            target[...] = source
        return
    runtime.memcpy2DAsync(
        target.data.ptr,
        row,
        source.data.ptr,
        source.strides[0],
        row,
        target.shape[0],
        runtime.memcpyDeviceToDevice,
        stream.ptr,
    )


def _session_options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Nothing runs on the CPU, but a pool of its threads would wait for work in busy loops.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _error(error: Exception, device: Device) -> ModelError | DeviceError:
    line = first_line(error)
    text = str(error).lower()
    if any(
        words in text for words in ("out of memory", "failed to allocate", "smaller than requested")
    ):
        return DeviceMemoryError(
            f"{device} has too little free memory for the model",
            hint="Use --vram-limit for tiles, a smaller model, or --device cpu",
        )
    if "disable_cpu_ep_fallback" in text or "explicitly disabled by the user" in text:
        return DeviceError(
            f"parts of the model cannot run on {device}: {line}",
            hint="Use --device cpu, or a model without those operators",
        )
    return ModelError(f"ONNX Runtime cannot run the model on {device}: {line}")
