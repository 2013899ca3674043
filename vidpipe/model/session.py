"""Sessions of ONNX Runtime.

A session runs a compiled graph on one device. Its interface is the same for every device:

    bind(slot, outputs)      once for each ring slot, before the first frame: the addresses
                             that the slot's planes will be written to
    prepare()                once, when all slots are bound
    run(slot, inputs, ...)   one frame: read these planes, write the slot's
    set_strength(value)      from the next run on

On the CPU, `run` returns when the planes are written, and its event is None. On a GPU the
planes are CuPy arrays; `run` queues work on the stream it was made with and returns an event
without waiting for it. A captured CUDA graph belongs to one slot and to fixed addresses, so
there the input planes are first copied on the device into the session's own, which are bound
once; `run` replays the slot's graph. Nothing else about a stage differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vidpipe.device import Event, Stream
from vidpipe.errors import DeviceError, ModelError
from vidpipe.frame import Array
from vidpipe.model import context
from vidpipe.model.cache import Cache
from vidpipe.model.compile import Compiled, Tensor
from vidpipe.model.descriptor import Descriptor
from vidpipe.providers import CPU_TARGET, Target
from vidpipe.providers.base import Found, Request
from vidpipe.providers.runtime import (
    default_threads,
    first_line,
    import_onnxruntime,
    threads_for,
)

if TYPE_CHECKING:
    from vidpipe.model.cuda import GraphUse

CPU_PROVIDER = "CPUExecutionProvider"

__all__ = [
    "CPU_PROVIDER",
    "CpuNode",
    "HostSession",
    "Session",
    "default_threads",
    "first_line",
    "import_onnxruntime",
    "must_compile",
    "open_session",
    "threads_for",
]


class Session(Protocol):
    """A compiled graph on one device."""

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """Say where the planes of a ring slot are.

        Args:
            slot: index of the slot.
            outputs: contiguous planes of `Compiled.outputs`, on the session's device; their
                memory stays where it is as long as the slot is used.
        """

    def prepare(self) -> GraphUse | None:
        """Make ready for the first frame, by the thread that will call `run`.

        Returns:
            What became of CUDA graphs; None where there are none.
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


@dataclass(frozen=True, slots=True)
class CpuNode:
    """A node that the CPU provider runs beside the one that was asked for.

    Attributes:
        name: in the graph.
        op: its operator.
    """

    name: str
    op: str

    def __str__(self) -> str:
        return f"{self.op} '{self.name}'" if self.name else self.op


class HostSession:
    """A compiled graph on any provider that takes NumPy arrays.

    Inputs that are contiguous are read where they are; others are copied once into a fixed
    buffer of the slot. Outputs are written in place. Several threads may `run` it at once, each
    another slot.

    Args:
        compiled: the graph.
        found: the provider and its device; the CPU provider if not given.
        threads: threads of one operator on the CPU; 0 for as many as there are processors.
        strength: first value of the strength input, where the model has one.
        prefer: "speed", "latency" or "efficiency".
        allow_cpu_nodes: let the CPU provider run nodes that the provider does not take.
        cache: where what the provider compiles is kept; None to keep nothing.
        name: of the model, for who looks into the cache.

    Attributes:
        cpu_nodes: the nodes that the CPU runs for another provider.
        note: one line about the cache, or "".

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: it cannot run the graph.
        DeviceError: parts of the graph would run elsewhere than was asked for.
    """

    def __init__(
        self,
        compiled: Compiled,
        found: Found | None = None,
        *,
        threads: int = 0,
        strength: float | None = None,
        prefer: str = "speed",
        allow_cpu_nodes: bool = False,
        cache: Cache | None = None,
        name: str = "",
    ) -> None:
        self._ort = import_onnxruntime()
        self.compiled = compiled
        self.found = found or CPU_TARGET.find()
        self.threads = threads or threads_for(prefer)
        self.note = ""
        self._request = _request(self.found, prefer, self.threads)
        self._graph = compiled.proto.SerializeToString()
        self._cache, self._name = cache, name
        if cache is not None and self.found.provider.cache_option:
            folder = cache.folder_for(context.RUNTIME_KIND, self._facts(allow_cpu_nodes))
            self._request = replace(self._request, cache=folder)
        self._session = self._open(allow_cpu_nodes)
        self._graph = b""
        self.cpu_nodes = self._check_nodes(allow_cpu_nodes)
        # Where the provider has memory of its own, an input is copied there when it is bound,
        # not when the session runs.
        self._copies = self.found.ep != CPU_PROVIDER
        self._bindings: dict[int, Any] = {}
        self._addresses: dict[int, list[int]] = {}
        self._staging: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        self._strength = np.zeros(compiled.strength_shape or (), np.float32)
        if strength is not None:
            self.set_strength(strength)

    def _open(self, allow_cpu_nodes: bool) -> Any:
        try:
            if self._cache is not None and self.found.provider.context:
                return self._load_kept(self._cache, allow_cpu_nodes)
            return self._load(self._graph, allow_cpu_nodes)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if not _is_fallback(error):
                raise ModelError(
                    f"ONNX Runtime cannot load the model on {self.found.label}: {first_line(error)}"
                ) from None
        return self._load(self._graph, True)  # only to name the nodes in the message

    def _facts(self, allow_cpu_nodes: bool) -> dict[str, Any]:
        return _facts(self.found, self._graph, self._request, allow_cpu_nodes, self._name)

    def _load_kept(self, cache: Cache, allow_cpu_nodes: bool) -> Any:
        """Return a session of what the provider compiled, now or in an earlier run."""
        loaded = context.load(
            cache,
            self._graph,
            self._facts(allow_cpu_nodes),
            lambda source: self._load(source, allow_cpu_nodes),
            lambda: self._options(allow_cpu_nodes)[0],
        )
        self.note = loaded.note
        return loaded.session

    def _load(self, source: bytes | str, allow_cpu_nodes: bool) -> Any:
        options, asked = self._options(allow_cpu_nodes)
        return self._ort.InferenceSession(source, options, enable_fallback=0, **asked)

    def _options(self, allow_cpu_nodes: bool) -> tuple[Any, dict[str, Any]]:
        """Return the session's options, and what `InferenceSession` is given besides."""
        found = self.found
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if found.ep != CPU_PROVIDER and not allow_cpu_nodes:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        found.provider.configure(options, self._request)
        return options, found.attach(options, found.provider.options(self._request))

    def _check_nodes(self, allow_cpu_nodes: bool) -> tuple[CpuNode, ...]:
        """Compare who runs the nodes with who was asked to."""
        found, runs = self.found, self.nodes_by_provider()
        others = set(runs) - {found.ep, CPU_PROVIDER}
        if others:
            raise DeviceError(f"asked for {found.ep}, got {', '.join(sorted(others))}")
        if found.ep == CPU_PROVIDER or CPU_PROVIDER not in runs:
            return ()
        nodes = tuple(
            CpuNode(node.name, node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            if part.ep_name == CPU_PROVIDER
            for node in part.get_nodes()
        )
        if found.ep not in runs:
            raise DeviceError(
                f"{found.ep} takes none of the model's {len(nodes)} nodes; the CPU would run all",
                hint="Use --device cpu, or another provider; see vidpipe devices",
            )
        if not allow_cpu_nodes:
            raise DeviceError(
                f"{found.ep} does not take {_listed(nodes)}, {len(nodes)} of "
                f"{sum(runs.values())} nodes",
                hint="Use --allow-cpu-nodes to run those on the CPU, or --device cpu",
            )
        return nodes

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """See `Session.bind`."""
        binding = self._session.io_binding()
        for tensor, plane in zip(self.compiled.outputs, outputs, strict=True):
            _check(tensor, plane)
            address = plane.ctypes.data
            binding.bind_output(tensor.name, "cpu", 0, tensor.dtype, tensor.shape, address)
        self._bind_strength(binding)
        self._bindings[slot] = binding
        self._addresses[slot] = [0] * len(self.compiled.inputs)

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """See `Session.run`."""
        assert stream is None
        binding, addresses = self._bindings[slot], self._addresses[slot]
        for i, (tensor, plane) in enumerate(zip(self.compiled.inputs, inputs, strict=True)):
            if not plane.flags.c_contiguous:
                plane = self._staged((slot, i), tensor, plane)
            address = plane.ctypes.data
            if addresses[i] != address or self._copies:
                binding.bind_input(tensor.name, "cpu", 0, tensor.dtype, tensor.shape, address)
                addresses[i] = address
        if self._copies:
            self._bind_strength(binding)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # see above
            raise ModelError(f"ONNX Runtime failed: {first_line(error)}") from None
        return None

    def _bind_strength(self, binding: Any) -> None:
        if self.compiled.strength is not None:
            value = self._strength
            binding.bind_input(
                self.compiled.strength, "cpu", 0, value.dtype, value.shape, value.ctypes.data
            )

    def prepare(self) -> None:
        """See `Session.prepare`; a first run is no slower than the next."""

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

    def _staged(self, key: tuple[int, int], tensor: Tensor, plane: Array) -> Array:
        buffer = self._staging.get(key)
        if buffer is None:
            buffer = self._staging[key] = np.empty(tensor.plane_shape, tensor.dtype)
        np.copyto(buffer, plane)
        return buffer


def _check(tensor: Tensor, plane: Array) -> None:
    assert plane.shape == tensor.plane_shape, (plane.shape, tensor.plane_shape)
    assert plane.dtype == tensor.dtype, (plane.dtype, tensor.dtype)
    assert plane.flags.c_contiguous


def open_session(
    model: Descriptor,
    compiled: Compiled,
    target: Target,
    *,
    stream: Any = None,
    threads: int = 0,
    strength: float | None = None,
    prefer: str = "speed",
    allow_cpu_nodes: bool = False,
    memory_bytes: int | None = None,
    half: bool = True,
) -> Session:
    """Return a session of a compiled graph on what was asked for, and on nothing else.

    Args:
        model: what `compiled` was compiled from.
        compiled: the graph.
        target: the provider and its device.
        stream: the CUDA stream to queue work on, where the target's memory is a GPU's.
        threads, strength, prefer, allow_cpu_nodes: see `HostSession`.
        memory_bytes: the most GPU memory that the provider may allocate, or None.
        half: let kernels around the model run it in float16, as `compiled` was.

    Raises:
        DeviceMemoryError: the GPU's memory, or the limit, does not suffice.
        MissingExtraError, DeviceError: the provider is not there, or would not run it all.
        ModelError: ONNX Runtime cannot run the graph.
    """
    if target.provider.memory == "cuda":
        from vidpipe.model.kernels import gpu_session

        return gpu_session(
            model,
            compiled,
            stream=stream,
            found=target.find(prefer),
            strength=strength,
            half=half,
            memory_bytes=memory_bytes,
        )
    return HostSession(
        compiled,
        target.find(prefer),
        threads=threads,
        strength=strength,
        prefer=prefer,
        allow_cpu_nodes=allow_cpu_nodes,
        cache=Cache(),
        name=model.name,
    )


def must_compile(
    model: Descriptor,
    compiled: Compiled,
    found: Found,
    *,
    threads: int = 0,
    prefer: str = "speed",
    allow_cpu_nodes: bool = False,
) -> bool:
    """Return whether `open_session` would keep its caller waiting for a provider's compiler.

    Args:
        model, compiled, threads, prefer, allow_cpu_nodes: as for `open_session`.
        found: the provider.
    """
    provider = found.provider
    if not provider.keeps:
        return False
    graph = compiled.proto.SerializeToString()
    request = _request(found, prefer, threads or threads_for(prefer))
    facts = _facts(found, graph, request, allow_cpu_nodes, model.name)
    kind = context.KIND if provider.context else context.RUNTIME_KIND
    return Cache().find(kind, facts) is None


def _request(found: Found, prefer: str, threads: int) -> Request:
    return Request(prefer=prefer, threads=threads, kind=found.kind)


def _facts(
    found: Found, graph: bytes, request: Request, allow_cpu_nodes: bool, name: str
) -> dict[str, Any]:
    facts = context.facts_for(found, graph, request, name)
    return {**facts, "cpu_nodes": allow_cpu_nodes}


def _is_fallback(error: Exception) -> bool:
    text = str(error).lower()
    return "fallback to cpu ep has been explicitly disabled" in text


def _listed(nodes: Sequence[CpuNode], most: int = 3) -> str:
    names = ", ".join(str(node) for node in nodes[:most])
    return names + (f" and {len(nodes) - most} more" if len(nodes) > most else "")
