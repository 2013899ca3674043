"""A user's function as a stage, on NumPy or CuPy arrays."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vidpipe.device import CPU, Device, Ring, new_stream
from vidpipe.errors import InputError, SpecError
from vidpipe.frame import Array, Frame, FrameSpec
from vidpipe.stage import Stage, register

PlanesFunction = Callable[[tuple[Array, ...], FrameSpec], Sequence[Array]]


@register("function")
class Function(Stage):
    """Calls a function on the planes of every frame.

        def brighter(planes, spec):
            y, *chroma = planes
            return (y + (255 - y) // 8, *chroma)

    The function gets the planes, which it must not write to, and their FrameSpec, and returns
    as many planes of the same dtype; all of them may be larger or smaller than before. On a GPU
    the planes are CuPy arrays, and the function runs with the stage's stream as the current
    one: CuPy queues its work there, and nothing waits for it.

    Args:
        function: the function; in a graph file its place, "module:name" or "file.py:name".
        device: "cpu", "cuda" or "cuda:N"; "auto" is where the frames are.
    """

    def __init__(self, *, function: PlanesFunction | str, device: str = "auto") -> None:
        self._function = _load(function) if isinstance(function, str) else function
        self._placed = None if device == "auto" else Device.parse(device)
        self._spec: FrameSpec | None = None
        self._out: FrameSpec | None = None
        self._ring: Ring | None = None
        self._stream: Any = None
        self._frames = 0

    def device_for(self, spec: FrameSpec) -> Device:
        """Return the device that the function works on."""
        return self._placed or spec.device

    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Try the function on a grey frame, to learn the size of what it returns.

        Raises:
            SpecError: it does not return planes of such a format.
            DeviceError: the device is not there.
        """
        self._spec = spec
        grey = 1 << (spec.format.bits - 1 + spec.format.shift)
        if spec.device == CPU:
            make: Any = np.full
            stream: Any = nullcontext()
        else:
            stream = new_stream(spec.device)
            import cupy

            make = cupy.full
        with stream:
            planes = tuple(make(shape, grey, spec.format.dtype) for shape in spec.plane_shapes())
            results = self._call(planes, spec)
        height, width = results[0].shape[:2]
        self._out = replace(spec, width=int(width), height=int(height))
        self._check(results)
        return self._out

    def _call(self, planes: tuple[Array, ...], spec: FrameSpec) -> Sequence[Array]:
        results = self._function(planes, spec)
        if not isinstance(results, tuple | list) or not all(hasattr(r, "shape") for r in results):
            raise SpecError(
                f"the function returned {type(results).__name__}",
                hint=f"Return a tuple of {len(planes)} planes",
            )
        return results

    def _check(self, results: Sequence[Array]) -> None:
        assert self._out is not None
        expected = [(tuple(s), self._out.format.dtype) for s in self._out.plane_shapes()]
        got = [(tuple(r.shape), r.dtype) for r in results]
        if got != expected:
            raise SpecError(
                f"the function returned planes of {_describe(got)}, expected {_describe(expected)}",
                hint=f"Return planes of {self._out.format}, all of one picture",
            )

    def open(self) -> None:
        """Allocate the ring."""
        assert self._out is not None
        shapes = [(shape, self._out.format.dtype) for shape in self._out.plane_shapes()]
        self._ring = Ring(shapes, self.ring_depth, self._out.device)
        if self._out.device != CPU:
            self._stream = new_stream(self._out.device)

    def process(self, frame: Frame) -> Iterable[Frame]:
        """Give what the function makes of one frame, in a slot of the ring.

        Raises:
            SpecError: other planes than in `plan`.
        """
        assert self._ring is not None
        assert self._out is not None
        stream = self._stream
        slot, planes = self._ring.lease()
        if stream is not None:
            frame.wait(stream)
            slot.write_by(stream)
        with nullcontext() if stream is None else stream:
            results = self._call(frame.planes, frame.spec)
            self._check(results)
            # A result may be freed memory of CuPy's pool before the next stage has read it.
            for result, plane in zip(results, planes, strict=True):
                plane[...] = result
        self._frames += 1
        ready = None
        if stream is not None:
            ready = stream.record()
            frame.read_by(stream, ready)
        return (frame.replace(planes, self._out, slot=slot, ready=ready),)

    def close(self) -> None:
        """Let go of the ring; planes that somebody holds stay valid."""
        self._ring = None

    def report(self) -> dict[str, Any]:
        """Return what was called. Keys: "summary", "function", "device", "frames"."""
        name = getattr(self._function, "__qualname__", repr(self._function))
        device = str(self._out.device if self._out else CPU)
        return {
            "summary": f"{name} on {device}",
            "function": name,
            "device": device,
            "frames": self._frames,
        }


def _describe(planes: Iterable[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in planes)


def _load(place: str) -> PlanesFunction:
    """Return the function at "module:name" or "file.py:name".

    Raises:
        InputError: there is none.
    """
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise InputError(f"function is '{place}'", hint="Write module:name, or file.py:name")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (ImportError, OSError) as error:
        raise InputError(f"'{where}' cannot be imported: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"'{where}' has no function '{name}'", hint="Check the name")
    return found  # type: ignore[no-any-return]
