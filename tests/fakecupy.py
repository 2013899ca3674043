"""Doubles of CuPy and ONNX Runtime's CUDA side: the GPU path on a machine without a GPU.

Arrays are host memory, but refuse NumPy arrays as CuPy's do. Copies and runs that are queued on a
stream are done only when somebody waits for it, so a missing wait shows in the pictures.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as real
import pytest

from vidpipe import device as devices

_lock = threading.RLock()
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()


class OutOfMemoryError(Exception):
    """Of CuPy's memory pool."""


class CUDARuntimeError(Exception):
    """Of the CUDA runtime."""


class Place:
    """The one device."""

    def __init__(self, index: int) -> None:
        assert index == 0

    def use(self) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None: ...


class Stream:
    """A queue of work that is done as late as possible."""

    device_id = 0

    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking
        self.ptr, self.elapsed_ms = id(self), 0.0
        self.work: list[Callable[[], Any]] = []
        self.add = self.work.append
        self.done = 0
        _streams[self.ptr] = self

    def reach(self, position: int) -> None:
        with _lock:
            while self.done < position:
                work, self.work[self.done] = self.work[self.done], lambda: None
                self.done += 1
                work()

    def synchronize(self) -> None:
        self.reach(len(self.work))

    def wait_event(self, event: Event) -> None:
        self.add(event.reach)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self.reach(len(self.work))  # what the block does at once comes behind it
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    """A position in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, len(stream.work)
        self.elapsed_ms = stream.elapsed_ms

    @property
    def done(self) -> bool:
        with _lock:  # not while its work is being done
            return self.stream is None or self.stream.done >= self.position

    def reach(self) -> None:
        if self.stream is not None:
            self.stream.reach(self.position)

    synchronize = reach


class Array(np.ndarray[Any, Any]):
    """A `cupy.ndarray`."""

    def __new__(cls, shape: Any, dtype: Any, memptr: Any = None) -> Array:
        if memptr is None:
            return np.empty(shape, dtype).view(cls)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory: Any = (ctypes.c_ubyte * size).from_address(memptr.ptr)
        memory.owner = memptr.mem  # every view keeps the memory, and with it the lease
        return np.ndarray.__new__(cls, shape, dtype, memory)

    data: Any = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))

    def get(self, stream: Any = None, out: Any = None, blocking: bool = True) -> Any:
        out = np.empty(self.shape, self.dtype) if out is None else out
        assert type(out) is np.ndarray
        if stream is None or blocking:
            np.copyto(out, self)
        else:
            stream.add(lambda: np.copyto(out, self))
        return out

    def set(self, values: Any, stream: Any = None) -> None:
        assert type(values) is np.ndarray
        holder: Any = values.base
        if isinstance(holder, devices._HostView):
            # Page-locked: read when the copy is made, and not kept until then.
            values = at(values.ctypes.data, values.shape, values.dtype)
        stream.add(lambda: np.copyto(self, values))

    def __setitem__(self, key: Any, value: Any) -> None:
        assert type(value) is not np.ndarray, "a host array is written to the device"
        super().__setitem__(key, value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (*inputs, *options.get("out", ()))
        if any(type(a) is np.ndarray and a.ndim for a in arrays):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")  # CuPy's words
        if "out" in options:
            options["out"] = tuple(a.view(np.ndarray) for a in options["out"])
        bare = [a.view(np.ndarray) if isinstance(a, Array) else a for a in inputs]
        result = getattr(ufunc, method)(*bare, **options)
        return result.view(Array) if isinstance(result, np.ndarray) else result


def at(ptr: int, shape: Any, dtype: Any) -> Any:
    """Return the host's view of memory at an address."""
    return Array(shape, dtype, SimpleNamespace(ptr=ptr, mem=None)).view(np.ndarray)


def _pitched(ptr: int, pitch: int, row: int, height: int) -> Any:
    return np.lib.stride_tricks.as_strided(at(ptr, (row,), np.uint8), (height, row), (pitch, 1))


def _copy_2d(to: int, pitch: int, source: int, step: int, *sizes: int) -> None:
    row, height, _, stream = sizes
    _streams[stream].add(
        lambda: np.copyto(_pitched(to, pitch, row, height), _pitched(source, step, row, height))
    )


class Script(SimpleNamespace):
    """What the doubles do, and what they were asked for.

    Attributes:
        free: bytes of memory that the GPU has free; `fits`: pixels that a session can take.
        providers: what sessions say they use; `capture`, `replay`: "ok", "fails", "differs".
        eager_ms, replay_ms: what a run takes.
        sessions: the provider options, session entries and run entries of every session.
        kernels: names of the kernels that were launched.
        compiled: the provider options of every model that was compiled into a file.
    """


class _Session:
    """Runs the graph on the CPU, when the stream comes to it."""

    def __init__(
        self, script: Script, proto: bytes | str, options: Any, providers: Any = None, **_: Any
    ) -> None:
        loaded = onnx.load(proto) if isinstance(proto, str) else onnx.load_from_string(proto)
        shape = loaded.graph.input[0].type.tensor_type.shape.dim
        if int(np.prod([d.dim_value for d in shape])) > script.fits:
            raise RuntimeError("[ONNXRuntimeError] : 6 : X : Failed to allocate memory for buffer")
        self.script = script
        self.settings = providers[0][1] if providers else options.devices[1]
        self.runs: list[dict[str, str]] = []
        script.sessions.append((self.settings, options.entries, self.runs, options.devices))
        self.stream = _streams[int(self.settings["user_compute_stream"])]
        quiet = real.SessionOptions()
        quiet.log_severity_level = 3
        self.real = real.InferenceSession(proto, quiet, providers=["CPUExecutionProvider"])
        self.captured: set[str] = set()

    def get_providers(self) -> list[str]:
        return list(self.script.providers)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=self.script.providers[0], get_nodes=lambda: [1, 2])]

    def io_binding(self) -> Any:
        bound: Any = SimpleNamespace(inputs=[], outputs=[])
        bound.bind_input = lambda *tensor: bound.inputs.append(tensor)
        bound.bind_output = lambda *tensor: bound.outputs.append(tensor)
        return bound

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        entries, script = options.entries, self.script
        self.runs.append(entries)
        (number,) = [v for k, v in entries.items() if "graph" in k] or ["-1"]
        replay = number in self.captured
        if number != "-1" and script.capture == "fails":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured |= {number} - {"-1"}
        self.stream.elapsed_ms += script.replay_ms if replay else script.eager_ms

        def work() -> None:
            feeds = {n: at(ptr, shape, kind) for n, _, _, kind, shape, ptr in binding.inputs}
            names = [name for name, *_ in binding.outputs]
            results = self.real.run(names, feeds)
            for (_, _, _, kind, shape, ptr), result in zip(binding.outputs, results, strict=True):
                wrong = replay and script.replay == "differs"
                np.copyto(at(ptr, shape, kind), result + 1 if wrong else result, casting="unsafe")

        self.stream.add(work)


class _Entries:
    """Keeps the entries, besides what ONNX Runtime's own class does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, str] = {}
        self.devices: Any = None

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value
        super().add_session_config_entry(key, value)  # type: ignore[misc]

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_provider_for_devices(self, found: Any, settings: dict[str, str]) -> None:
        self.devices = (found, settings)


@contextmanager
def installed() -> Iterator[Script]:
    """Put the doubles in place of the modules; give what directs them."""
    script = Script(
        free=1 << 40, fits=1 << 40, providers=["CUDAExecutionProvider"], capture="ok",
        replay="ok", eager_ms=2.0, replay_ms=1.0, sessions=[], kernels=[], compiled=[],
    )  # fmt: skip

    pool: list[Array] = []

    def empty(shape: Any, dtype: Any) -> Array:
        array = Array(shape, dtype)
        if array.nbytes > script.free:
            raise OutOfMemoryError
        array.fill(0)
        pool.append(array)  # like CuPy's: memory that is let go of stays mapped
        return array

    def kernel(name: str) -> Callable[..., None]:
        def launch(grid: Any, block: Any, arguments: Any, *, stream: Stream) -> None:
            assert stream.ptr in _streams
            script.kernels.append(name)

        return launch

    cupy: Any = ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.zeros = Array, empty, empty
    cupy.full = lambda shape, value, dtype: np.full(shape, value, dtype).view(Array)
    cupy.asarray = lambda a: np.array(a).view(Array)
    cupy.array_equal = np.array_equal
    cupy.ascontiguousarray = lambda a: a if a.flags.c_contiguous else a.copy()
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    cupy.RawModule = lambda code, options: SimpleNamespace(get_function=kernel)
    cupy.cuda = SimpleNamespace(
        Device=Place,
        Event=Event,
        nvtx=SimpleNamespace(available=False),
        Stream=Stream,
        MemoryPointer=lambda mem, offset: SimpleNamespace(mem=mem, ptr=mem.ptr + offset),
        UnownedMemory=lambda ptr, size, owner, index: SimpleNamespace(ptr=ptr, owner=owner),
        get_elapsed_time=lambda begin, end: end.elapsed_ms - begin.elapsed_ms,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        runtime=SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpy2DAsync=_copy_2d,
            memcpyDeviceToDevice=3,
            memGetInfo=lambda: (script.free, script.free),
        ),
    )
    ort: Any = ModuleType("onnxruntime")
    ort.__version__ = real.__version__
    ort.disable_telemetry_events = lambda: None
    ort.set_default_logger_severity = lambda _level: None
    ort.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    ort.SessionOptions = type("SessionOptions", (_Entries, real.SessionOptions), {})
    ort.RunOptions = type("RunOptions", (_Entries, real.RunOptions), {})

    def inference_session(proto: bytes, options: Any, **others: Any) -> Any:
        if "CPU" in str(others.get("providers")):
            return real.InferenceSession(proto, options, **others)
        return _Session(script, proto, options, **others)

    ort.InferenceSession = inference_session

    def compiler(options: Any, graph: bytes, **_: Any) -> Any:
        script.compiled.append(options.devices[1])
        return SimpleNamespace(compile_to_file=lambda path: Path(path).write_bytes(graph))

    ort.ModelCompiler = compiler
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        pinned = SimpleNamespace(empty_pinned=lambda *what: empty(*what).view(np.ndarray))
        patch.setitem(sys.modules, "cupyx", pinned)
        patch.setitem(sys.modules, "onnxruntime", ort)
        devices._stream_class.cache_clear()
        try:
            yield script
        finally:
            devices._stream_class.cache_clear()
