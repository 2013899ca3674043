"""The stage that runs a model on every frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from vidpipe.device import CPU, Device, Ring, import_cupy, new_stream
from vidpipe.errors import DeviceMemoryError, ModelError, SpecError
from vidpipe.frame import Array, Frame, FrameSpec
from vidpipe.model import tiling
from vidpipe.model.compile import Compiled, alignment, compile_model, output_spec
from vidpipe.model.cuda import GraphUse
from vidpipe.model.descriptor import Descriptor, describe, find_model
from vidpipe.model.session import CpuNode, Session, open_session, threads_for
from vidpipe.providers import Target
from vidpipe.providers.base import PREFERENCES
from vidpipe.stage import Stage, register

DEFAULT_STRENGTH = 1.0
"""Strength of models that take one, where none is asked for: all of it."""

_SAMPLED_FRAMES = 25
_SAMPLED_ROWS = 8


@register("model")
class Model(Stage):
    """Runs an ONNX model on every frame: planes in, planes of `scale` times the size out.

    Args:
        model: name of a built-in model, or path of an ONNX file.
        strength: value of the model's strength input, from 0 (leave the picture alone) to 1
            in the built-in models; 1 if not given. May be changed by `set_strength`.
        device: the execution provider, such as "cpu", "cuda:1" or "openvino"; see
            docs/providers.md. "auto" is the one that works where the frames are.
        prefer: "speed", "latency" or "efficiency": what the provider is configured for.
        allow_cpu_nodes: let the CPU run what the provider does not take of the model;
            otherwise that is an error.
        chosen: why this device was chosen, for the report.
        threads: threads of one operator on the CPU; 0 for as many as there are processors.
        tile: "auto" (only when memory is short), "off", or the size of the tiles in input
            pixels such as "640x360", overlap included.
        memory_limit: memory that the model may take, such as "2G"; half of what is free if
            not given. Decides about tiles.
    """

    takes_memory = True

    def __init__(
        self,
        *,
        model: str,
        strength: float | None = None,
        device: str = "auto",
        prefer: str = "speed",
        allow_cpu_nodes: bool = False,
        chosen: str = "",
        threads: int = 0,
        tile: str = "auto",
        memory_limit: str | None = None,
    ) -> None:
        if strength is not None and not math.isfinite(strength):
            raise SpecError(f"strength is {strength}, expected a number")
        if threads < 0:
            raise SpecError(f"threads is {threads}, expected 0 or more")
        if prefer not in PREFERENCES:
            raise SpecError(f"prefer is '{prefer}', expected {', '.join(PREFERENCES)}")
        self.model = model
        self.strength = strength
        self.device = device
        self.prefer = prefer
        self.allow_cpu_nodes = allow_cpu_nodes
        self.chosen = chosen
        self._asked = None if device == "auto" else Target.parse(device)
        self.threads = threads
        self.tile = tile
        self.memory_limit = memory_limit
        self._tile_size = None if tile in ("auto", "off") else tiling.parse_size(tile)
        self._limit = None if memory_limit is None else tiling.parse_bytes(memory_limit)
        self._descriptor: Descriptor | None = None
        self._spec: FrameSpec | None = None
        self._out: FrameSpec | None = None
        self._session: Session | None = None
        self._ring: Ring | None = None
        self._stream: Any = None
        self._bound: set[int] = set()
        self._layout: tiling.Layout | None = None
        self._nodes: dict[str, int] = {}
        self._cpu_nodes: Sequence[CpuNode] = ()
        self._threads = threads
        self._frames = 0
        self._grown = 0
        self._samples = 0
        self._change_sum: Any = np.zeros(1)
        self._graph_use: GraphUse | None = None

    @property
    def descriptor(self) -> Descriptor:
        """What the model promises; read from its file once.

        Raises:
            ModelError: there is no such model, or it cannot be used.
        """
        if self._descriptor is None:
            descriptor = describe(find_model(self.model))
            if self.strength is not None and descriptor.strength is None:
                raise ModelError(
                    f"model '{descriptor.name}' has no strength input",
                    hint="Leave out the strength, or use a model that has one",
                )
            self._descriptor = descriptor
        return self._descriptor

    def device_for(self, spec: FrameSpec) -> Device:
        """Return where the model takes frames."""
        return self._asked.place if self._asked else spec.device

    def _target(self, spec: FrameSpec) -> Target:
        return self._asked or Target.of(spec.device)

    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Return the enlarged spec; format, time base and rate stay.

        Colour tags stay too, save for a matrix that was not tagged and that players would
        guess differently at the new size: it is then tagged as what the input was.

        Raises:
            ModelError: the model cannot be used.
            SpecError: it cannot take such frames.
        """
        if self.device_for(spec) != spec.device:
            raise SpecError(
                f"the model runs on {self.device_for(spec)}, the frames are on {spec.device}",
                hint="Run it in a graph, which moves them",
            )
        out = output_spec(self.descriptor, spec)
        self._plan_tiles(spec)
        self._spec, self._out = spec, out
        return out

    def open(self) -> None:
        """Compile the graph, load it and allocate the ring.

        On a GPU every slot is run once and its CUDA graph captured. On the CPU nothing is
        run: a first run there is no slower than the next.

        Raises:
            ModelError: ONNX Runtime cannot load the graph.
            SpecError: the memory limit is too small even for tiles.
            DeviceError: the device is not there, or its memory does not suffice.
        """
        assert self._spec is not None
        assert self._out is not None
        spec, out, model = self._spec, self._out, self.descriptor
        target = self._target(spec)
        layout = self._plan_tiles(spec)
        compiled = self._compile(tiling.tile_spec(spec, layout) if layout else spec, target)
        limit = self._limit or self.memory_bytes or tiling.available_bytes(spec.device)
        whole = compiled
        if layout is None and self.tile == "auto":
            layout = tiling.choose(model, whole, limit)
            if layout is not None:
                compiled = self._compile(tiling.tile_spec(spec, layout), target)
        shapes = [(shape, out.format.dtype) for shape in out.plane_shapes()]
        self._ring = Ring(shapes, self.ring_depth, out.device)
        self._bound.clear()
        self._stream = None if spec.device == CPU else new_stream(spec.device)
        if spec.device != CPU:
            self._change_sum = import_cupy(spec.device).asarray(self._change_sum)
        self._threads = self.threads or threads_for(self.prefer)
        while True:
            try:
                self._start(compiled, layout, target)
                return
            except DeviceMemoryError:
                # The estimate knows no scratch memory of the provider's own.
                limit //= 2
                if self.tile != "auto" or (layout is None and limit == 0):
                    raise
                self._stop()
                layout = tiling.choose(model, whole, limit)
                if layout is not None:
                    compiled = self._compile(tiling.tile_spec(spec, layout), target)

    def _start(self, compiled: Compiled, layout: tiling.Layout | None, target: Target) -> None:
        """Load the graph, bind the ring's slots, and run each once where that prepares them."""
        assert self._spec is not None
        assert self._out is not None
        assert self._ring is not None
        session = open_session(
            self.descriptor,
            compiled,
            target,
            stream=self._stream,
            threads=self._threads,
            strength=DEFAULT_STRENGTH if self.strength is None else self.strength,
            prefer=self.prefer,
            allow_cpu_nodes=self.allow_cpu_nodes,
            memory_bytes=self.memory_bytes,
        )
        self._cpu_nodes = getattr(session, "cpu_nodes", ())
        if layout is not None:
            session = tiling.TiledSession(
                session, compiled, layout, self._spec, self._out, stream=self._stream
            )
        self._session, self._layout = session, layout
        self._nodes = session.nodes_by_provider()
        for slot in self._ring.slots:
            self._bind(slot.index, slot.buffers)
        self._graph_use = session.prepare()

    def _stop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._bound.clear()

    def _compile(self, spec: FrameSpec, target: Target) -> Compiled:
        wanted = target.provider
        return compile_model(
            self.descriptor, spec, portable=wanted.portable, half=wanted.half, widen=wanted.widen
        )

    def process(self, frame: Frame) -> Iterable[Frame]:
        """Give the model's picture of one frame, in a slot of the ring."""
        assert self._ring is not None
        assert self._session is not None
        assert self._out is not None
        slot, planes = self._ring.lease()
        if slot.index not in self._bound:
            self._bind(slot.index, slot.buffers)
        if self._stream is not None:
            frame.wait(self._stream)
            slot.write_by(self._stream)
        event = self._session.run(slot.index, frame.planes, self._stream)
        if self._stream is not None:
            frame.read_by(self._stream)
        result = frame.replace(planes, self._out, slot=slot, ready=event)
        if self._frames % _SAMPLED_FRAMES == 0:
            self._sample(frame.planes[0], planes[0])
        self._frames += 1
        return (result,)

    def _sample(self, before: Array, after: Array) -> None:
        assert self._out is not None
        self._samples += 1
        with nullcontext() if self._stream is None else self._stream:
            # On a GPU the sum stays there until the run is over.
            self._change_sum += mean_change(before, after, self._out)

    def set_strength(self, value: float) -> None:
        """Change the strength from the next frame on. May be called from any thread.

        Raises:
            ModelError: the model has no strength input.
        """
        if self.descriptor.strength is None:
            raise ModelError(f"model '{self.descriptor.name}' has no strength input")
        self.strength = value
        if self._session is not None:
            self._session.set_strength(value)

    def close(self) -> None:
        """Let go of the session and the ring; planes that somebody holds stay valid."""
        self._stop()
        self._change_sum = np.full(1, float(self._change_sum[0]))
        if self._ring is not None:
            self._grown += self._ring.grown
        self._ring = None

    def report(self) -> dict[str, Any]:
        """Return what ran where.

        Keys: "summary", "model", "scale", "frames", "device" (where the frames were),
        "provider" (what `--device` calls it), "chosen" (why, where it was not asked for),
        "threads", "nodes" (how many nodes each execution provider ran), "cpu_nodes" (name and
        operator of those that the CPU ran for another provider), "tiles" (None, or their
        layout), "ring_grown", "strength" where the model has one, and "mean_change": the mean
        absolute difference between the input's first plane and the output's, averaged down
        to the input's size, in 8-bit code values; over every 25th frame and every 8th row.
        """
        model = self._descriptor
        facts: dict[str, Any] = {
            "model": model.name if model else self.model,
            "scale": model.scale if model else None,
            "frames": self._frames,
            "device": str(self._spec.device if self._spec else CPU),
            "provider": str(self._target(self._spec) if self._spec else self.device),
            "chosen": self.chosen or None,
            "threads": self._threads,
            "nodes": dict(self._nodes),
            "cpu_nodes": [asdict(node) for node in self._cpu_nodes],
            "tiles": str(self._layout) if self._layout else None,
            "ring_grown": self._grown,
            "mean_change": float(self._change_sum[0]) / self._samples if self._samples else None,
        }
        if self._graph_use is not None:
            facts["cuda_graph"] = asdict(self._graph_use)
        if model is not None and model.strength is not None:
            facts["strength"] = DEFAULT_STRENGTH if self.strength is None else self.strength
        if self._cpu_nodes:
            names = ", ".join(map(str, self._cpu_nodes))
            facts["notes"] = [f"the CPU ran nodes of the model: {names}"]
        return {"summary": _summary(facts), **facts}

    def _bind(self, slot: int, buffers: tuple[Array, ...]) -> None:
        assert self._session is not None
        self._session.bind(slot, buffers)
        self._bound.add(slot)

    def _plan_tiles(self, spec: FrameSpec) -> tiling.Layout | None:
        """Return the tiles that are certain: asked for, or needed by a model of fixed size."""
        model = self.descriptor
        if model.size is not None:
            x, y = alignment(model, spec)
            padded = (-(-spec.width // x) * x, -(-spec.height // y) * y)
            return None if padded == model.size else tiling.lay_out(model, spec, *model.size)
        if self._tile_size is not None:
            return tiling.lay_out(model, spec, *self._tile_size)
        return None


def _summary(facts: dict[str, Any]) -> str:
    nodes = ", ".join(f"{count} nodes on {name}" for name, count in facts["nodes"].items())
    text = f"{facts['model']}: {nodes or 'not run'}"
    if facts["chosen"]:
        text += f"; {facts['chosen']}"
    if facts["tiles"]:
        text += f"; tiles: {facts['tiles']}"
    graph = facts.get("cuda_graph")
    if graph is not None:
        text += "; CUDA graphs" if graph["used"] else f"; no CUDA graphs: {graph['reason']}"
    if facts["mean_change"] is not None:
        text += f"; changed the picture by {facts['mean_change']:.2f} code values on average"
    return text


def mean_change(before: Array, after: Array, out: FrameSpec) -> Any:
    """Return how much a model changed the first plane, in 8-bit code values.

    The mean absolute difference between the input and the output averaged down to the
    input's size, on every 8th row.

    Args:
        before: shape (h, w), uint8 or uint16, NumPy or CuPy.
        after: shape (h * s, w * s), likewise.
        out: spec of `after`.

    Returns:
        A number, on the arrays' device.
    """
    height, width = before.shape
    scale = after.shape[0] // height
    rows = after.reshape(height, scale, width, scale)[::_SAMPLED_ROWS]
    total: Array = before[::_SAMPLED_ROWS].astype(np.int32) * -(scale**2)
    for y in range(scale):
        for x in range(scale):
            total += rows[:, y, :, x]
    unit = scale**2 * (1 << (out.format.bits - 8 + out.format.shift))
    return abs(total).mean() / unit
