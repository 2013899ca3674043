"""The one place that talks to ONNX Runtime.

A session runs a compiled graph on one device. Its interface is the same for every device:

    bind(slot, outputs)      once for each ring slot, before the first frame: the addresses
                             that the slot's planes will be written to
    run(slot, inputs, ...)   one frame: read these planes, write the slot's
    set_strength(value)      from the next run on

On the CPU, `run` returns when the planes are written, and its event is None. On a GPU the
planes are CuPy arrays; `run` queues work on the stream it was made with and returns an event
without waiting for it. A captured CUDA graph belongs to one slot and to fixed addresses, so
there the input planes are first copied on the device into the session's own, which are bound
once; `run` replays the slot's graph. Nothing else about a stage differs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vidpipe.device import Event, Stream
from vidpipe.errors import DeviceError, MissingExtraError, ModelError
from vidpipe.frame import Array
from vidpipe.model.compile import Compiled, Tensor

CPU_PROVIDER = "CPUExecutionProvider"


class Session(Protocol):
    """A compiled graph on one device."""

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """Say where the planes of a ring slot are.

        Args:
            slot: index of the slot.
            outputs: contiguous planes of `Compiled.outputs`, on the session's device; their
                memory stays where it is as long as the slot is used.
        """

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """Write a bound slot's planes from one frame's.

        Args:
            slot: index of a slot that was bound.
            inputs: planes of `Compiled.inputs`, on the session's device, any row pitch.
            stream: what to queue the work on; None on the CPU.

        Returns:
            The event after which the outputs may be read and the inputs be overwritten, or
            None if that is already so.
        """

    def set_strength(self, value: float) -> None:
        """Set the model's strength for the runs to come."""

    def nodes_by_provider(self) -> dict[str, int]:
        """Return how many nodes each execution provider was given."""

    def close(self) -> None:
        """Let go of the memory."""


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


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class CpuSession:
    """A compiled graph on the CPU provider.

    Inputs that are contiguous are read where they are; others are copied once into a fixed
    buffer. Outputs are written in place.

    Args:
        compiled: the graph.
        threads: threads of one operator; 0 for as many as there are processors.
        strength: first value of the strength input, where the model has one.
        spinning: let idle threads of the pool wait in a busy loop.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: it cannot run the graph.
        DeviceError: it chose other providers.
    """

    def __init__(
        self,
        compiled: Compiled,
        *,
        threads: int = 0,
        strength: float | None = None,
        spinning: bool = False,
    ) -> None:
        ort = import_onnxruntime()
        self.compiled = compiled
        self.threads = threads or default_threads()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self._session = ort.InferenceSession(
                compiled.proto.SerializeToString(),
                options,
                providers=[CPU_PROVIDER],
                enable_fallback=0,
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(f"ONNX Runtime cannot load the model: {first_line(error)}") from None
        if self._session.get_providers() != [CPU_PROVIDER]:
            raise DeviceError(
                f"asked for {CPU_PROVIDER}, got {', '.join(self._session.get_providers())}"
            )
        self._bindings: dict[int, Any] = {}
        self._addresses: dict[int, list[int]] = {}
        self._staging: dict[int, np.ndarray[Any, Any]] = {}
        self._strength = np.zeros(compiled.strength_shape or (), np.float32)
        if strength is not None:
            self.set_strength(strength)

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """See `Session.bind`."""
        binding = self._session.io_binding()
        for tensor, plane in zip(self.compiled.outputs, outputs, strict=True):
            _check(tensor, plane)
            address = plane.ctypes.data
            binding.bind_output(tensor.name, "cpu", 0, tensor.dtype, tensor.shape, address)
        if self.compiled.strength is not None:
            value = self._strength
            binding.bind_input(
                self.compiled.strength, "cpu", 0, value.dtype, value.shape, value.ctypes.data
            )
        self._bindings[slot] = binding
        self._addresses[slot] = [0] * len(self.compiled.inputs)

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """See `Session.run`."""
        assert stream is None
        binding, addresses = self._bindings[slot], self._addresses[slot]
        for i, (tensor, plane) in enumerate(zip(self.compiled.inputs, inputs, strict=True)):
            if not plane.flags.c_contiguous:
                plane = self._staged(i, tensor, plane)
            address = plane.ctypes.data
            if addresses[i] != address:
                binding.bind_input(tensor.name, "cpu", 0, tensor.dtype, tensor.shape, address)
                addresses[i] = address
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # see above
            raise ModelError(f"ONNX Runtime failed: {first_line(error)}") from None
        return None

    def set_strength(self, value: float) -> None:
        """See `Session.set_strength`."""
        self._strength[...] = value

    def nodes_by_provider(self) -> dict[str, int]:
        """See `Session.nodes_by_provider`."""
        counts: dict[str, int] = {}
        for part in self._session.get_provider_graph_assignment_info():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        return counts

    def close(self) -> None:
        """See `Session.close`."""
        self._bindings.clear()
        self._staging.clear()
        self._session = None

    def _staged(self, index: int, tensor: Tensor, plane: Array) -> Array:
        buffer = self._staging.get(index)
        if buffer is None:
            buffer = self._staging[index] = np.empty(tensor.plane_shape, tensor.dtype)
        np.copyto(buffer, plane)
        return buffer


def _check(tensor: Tensor, plane: Array) -> None:
    assert plane.shape == tensor.plane_shape, (plane.shape, tensor.plane_shape)
    assert plane.dtype == tensor.dtype, (plane.dtype, tensor.dtype)
    assert plane.flags.c_contiguous


def first_line(error: Exception) -> str:
    """Return the first line of ONNX Runtime's message, without its code."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
