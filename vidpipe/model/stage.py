"""The stage that runs a model on every frame."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from vidpipe.device import (
    CPU,
    Device,
    Event,
    Ring,
    Slot,
    available_bytes,
    import_cupy,
    new_stream,
)
from vidpipe.errors import DeviceError, DeviceMemoryError, ModelError, SpecError, VidpipeError
from vidpipe.frame import Array, Frame, FrameSpec
from vidpipe.model import tiling
from vidpipe.model.compile import Compiled, alignment, compile_model, output_spec
from vidpipe.model.cuda import GraphUse
from vidpipe.model.descriptor import Descriptor, describe, find_model
from vidpipe.model.lanes import Lanes
from vidpipe.model.session import CpuNode, Session, must_compile, open_session, threads_for
from vidpipe.model.swap import SwapSession, SwapState
from vidpipe.model.variant import Variant, check_precision, variant
from vidpipe.providers import CPU_TARGET, Target
from vidpipe.providers.base import PREFERENCES, Found
from vidpipe.stage import Stage, register

DEFAULT_STRENGTH = 1.0
"""Strength of models that take one, where none is asked for: all of it."""

_SAMPLED_FRAMES = {"cpu": 25, "cuda": 100}  # of which one is; on a GPU it takes a dozen launches
_SAMPLED_ROWS = 8

_Job: TypeAlias = tuple[Frame, Slot, tuple[Array, ...]]
"""What goes in, and the slot and planes that take what comes out."""


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
        precision: "auto" (float16 where a GPU gains by it, else float32), "fp32", "fp16" or
            "int8", or "fp8" and "fp4" on "rtx"; see docs/precision.md.
        wait_compile: wait until a provider has compiled the model. Otherwise the CPU runs the
            first frames, where the frames are in host memory.
        chosen: why this device was chosen, for the report.
        threads: threads on the CPU; 0 for as many as there are processors. Where the rate counts
            alone, they are shared by two frames at once: with `prefer` "speed", behind a source
            that is not live.
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
        precision: str = "auto",
        wait_compile: bool = False,
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
        check_precision(precision)
        self.model = model
        self.strength = strength
        self.device = device
        self.prefer = prefer
        self.allow_cpu_nodes = allow_cpu_nodes
        self.precision = precision
        self.wait_compile = wait_compile
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
        self._variant: Variant | None = None
        self._swap: SwapSession | None = None
        self._opened: dict[str, tuple[Sequence[CpuNode], str]] = {}
        self._nodes: dict[str, int] = {}
        self._threads = threads
        self._lanes: Lanes[_Job] | None = None
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
        target = self._target(spec)
        chosen = self._choose_variant(target.provider.half, target.kind, target.provider.name)
        out = output_spec(chosen.model, spec)
        tiles = self._plan_tiles(spec)
        self._spec, self._out = spec, out
        self._threads = self.threads or threads_for(self.prefer)
        self.holds = 0
        if self.prefer == "speed" and not self.live and tiles is None and self._threads % 2 == 0:
            # Beside the one in `process`, as many as can run, so that no lane waits for the next.
            self.holds = target.provider.lanes if target.provider.lanes > 1 else 0
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
        spec, out = self._spec, self._out
        target = self._target(spec)
        found = target.find(self.prefer)
        self._variant = self._choose_variant(found.provider.half, found.kind, found.provider.name)
        model = self._variant.model
        layout = self._plan_tiles(spec)
        compiled = self._compile(tiling.tile_spec(spec, layout) if layout else spec, target)
        limit = self._limit or self.memory_bytes or available_bytes(spec.device)
        whole = compiled
        lanes = self.holds or 1
        if lanes > 1 and not tiling.fits(whole, lanes, limit):
            lanes = 1
        if lanes == 1 and layout is None and self.tile == "auto":
            layout = tiling.choose(model, whole, limit)
            if layout is not None:
                compiled = self._compile(tiling.tile_spec(spec, layout), target)
        shapes = [(shape, out.format.dtype) for shape in out.plane_shapes()]
        self._ring = Ring(shapes, self.ring_depth + self.holds, out.device)
        self._bound.clear()
        self._stream = None if spec.device == CPU else new_stream(spec.device)
        if spec.device != CPU:
            self._change_sum = import_cupy(spec.device).asarray(self._change_sum)
        while True:
            try:
                self._start(compiled, layout, target, found, lanes)
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

    def _choose_variant(self, gains: bool, kind: str, provider: str) -> Variant:
        """Return what runs: where float16 gains nothing, "auto" treats a GPU as a CPU."""
        on_cpu = kind == "cpu" or (self.precision == "auto" and not gains)
        return variant(self.descriptor, self.precision, on_cpu=on_cpu, provider=provider)

    def _start(
        self,
        compiled: Compiled,
        layout: tiling.Layout | None,
        target: Target,
        found: Found,
        lanes: int,
    ) -> None:
        """Load the graph, bind the ring's slots, and run each once where that prepares them."""
        assert self._out is not None
        assert self._ring is not None
        self._opened.clear()
        self._swap = self._lanes = None
        session: Session
        if self._begins_on_cpu(compiled, found):
            first = self._open(self._compile(compiled.spec, CPU_TARGET), layout, CPU_TARGET)
            strength = None if self.descriptor.strength is None else self._strength
            self._swap = session = SwapSession(
                first,
                lambda: self._open(compiled, layout, target),
                label=str(target),
                format=self._out.format,
                strength=strength,
            )
        else:
            session = self._open(compiled, layout, target, lanes)
            if lanes > 1:
                self._lanes = Lanes(lanes, self.clock, self.wake, self.name)
        self._session, self._layout = session, layout
        self._nodes = session.nodes_by_provider()
        for slot in self._ring.slots:
            self._bind(slot.index, slot.buffers)
        self._graph_use = session.prepare()

    def _begins_on_cpu(self, compiled: Compiled, found: Found) -> bool:
        """Return whether the CPU is to run frames while the provider compiles."""
        assert self._variant is not None
        if self.wait_compile or found.provider.memory != "cpu":
            return False
        # Two providers round a chain of int8 layers too differently to be swapped unseen.
        return self._variant.precision != "int8" and must_compile(
            self._variant.model,
            compiled,
            found,
            threads=self._threads,
            prefer=self.prefer,
            allow_cpu_nodes=self.allow_cpu_nodes,
        )

    def _open(
        self, compiled: Compiled, layout: tiling.Layout | None, target: Target, lanes: int = 1
    ) -> Session:
        """Return a session for whole frames; called by another thread while frames flow."""
        assert self._spec is not None
        assert self._out is not None
        assert self._variant is not None
        session = open_session(
            self._variant.model,
            compiled,
            target,
            stream=self._stream,
            threads=self._threads // lanes,
            strength=self._strength,
            prefer=self.prefer,
            allow_cpu_nodes=self.allow_cpu_nodes,
            memory_bytes=self.memory_bytes,
            half=self._variant.half,
        )
        note = getattr(session, "note", "")
        self._opened[str(target)] = (getattr(session, "cpu_nodes", ()), note)
        if layout is not None:
            session = tiling.TiledSession(
                session, compiled, layout, self._spec, self._out, stream=self._stream
            )
        return session

    def _stop(self) -> None:
        if self._lanes is not None:
            self._lanes.close()
        session, self._session = self._session, None
        if session is not None:
            self._nodes = session.nodes_by_provider()
            session.close()
        self._bound.clear()

    def _compile(self, spec: FrameSpec, target: Target) -> Compiled:
        assert self._variant is not None
        wanted = target.provider
        return compile_model(
            self._variant.model,
            spec,
            portable=wanted.portable,
            half=self._variant.half,
            widen=wanted.widen,
        )

    @property
    def _strength(self) -> float:
        return DEFAULT_STRENGTH if self.strength is None else self.strength

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
        if self._lanes is not None:
            run = functools.partial(self._session.run, slot.index, frame.planes)
            self._lanes.put(run, (frame, slot, planes), frame.pts)
            return self._done(self._lanes.count)
        event = self._session.run(slot.index, frame.planes, self._stream)
        if self._swap is not None:
            self._check_swap(self._swap)
        if self._stream is not None:
            frame.read_by(self._stream, event)
        return (self._result(frame, slot, planes, event),)

    def _result(
        self, frame: Frame, slot: Slot, planes: tuple[Array, ...], event: Event | None
    ) -> Frame:
        assert self._out is not None
        result = frame.replace(planes, self._out, slot=slot, ready=event)
        if self._frames % _SAMPLED_FRAMES[frame.spec.device.kind] == 0:
            self._sample(frame.planes[0], planes[0])
        self._frames += 1
        return result

    def _done(self, left: int) -> Iterator[Frame]:
        """Yield the frames that the lanes are done with; wait until so many are left."""
        if self._lanes is None:
            return
        for job, error, aside_s in self._lanes.done(left):
            self.aside_s += aside_s
            if isinstance(error, VidpipeError):
                error.at(self.name, job[0].time_s)
            if error is not None:
                raise error
            yield self._result(*job, None)
            del job

    def ready(self) -> Iterable[Frame]:
        """Give the frames that were run meanwhile."""
        return () if self._lanes is None else self._done(len(self._lanes))

    def flush(self) -> Iterable[Frame]:
        """Give the frames that are still being run."""
        return self._done(0)

    def _check_swap(self, swap: SwapSession) -> None:
        """Refuse to go on without a device that the user named."""
        state = swap.state
        if state.state == "failed" and state.difference is None and not self.chosen:
            raise swap.error or DeviceError(
                f"{state.label} cannot run the model: {state.note}",
                hint="Use --device cpu, or another provider; see vidpipe devices",
            )

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
        "provider" (what `--device` calls the one that ran last), "precision", "chosen" (why,
        where it was not asked for), "swap" (None, or a `SwapState` as a dict),
        "threads", "at_once" (frames that share them), "nodes" (how many nodes each execution
        provider ran), "cpu_nodes" (name and operator of those that the CPU ran for another
        provider), "tiles" (None, or their layout), "ring_grown", "strength" where the model has
        one, and "mean_change": the mean absolute difference between the input's first plane and
        the output's, averaged down to the input's size, in 8-bit code values; over every 25th
        frame (on a GPU every 100th) and every 8th row.
        """
        model = self._descriptor
        asked = str(self._target(self._spec) if self._spec else self.device)
        swap = self._swap.state if self._swap is not None else None
        provider = asked if swap is None or swap.state == "swapped" else str(CPU_TARGET)
        cpu_nodes, note = self._opened.get(provider, ((), ""))
        facts: dict[str, Any] = {
            "model": model.name if model else self.model,
            "scale": model.scale if model else None,
            "frames": self._frames,
            "device": str(self._spec.device if self._spec else CPU),
            "provider": provider,
            "precision": self._variant.precision if self._variant else self.precision,
            "swap": swap.to_dict() if swap else None,
            "chosen": self.chosen or None,
            "threads": self._threads,
            "at_once": self._lanes.count if self._lanes is not None else 1,
            "nodes": dict(self._nodes),
            "cpu_nodes": [asdict(node) for node in cpu_nodes],
            "tiles": str(self._layout) if self._layout else None,
            "ring_grown": self._grown,
            "mean_change": float(self._change_sum[0]) / self._samples if self._samples else None,
        }
        if self._graph_use is not None:
            facts["cuda_graph"] = asdict(self._graph_use)
        if model is not None and model.strength is not None:
            facts["strength"] = self._strength
        notes = [note] if note else []
        if cpu_nodes:
            notes.append(f"the CPU ran nodes of the model: {', '.join(map(str, cpu_nodes))}")
        if swap is not None and swap.state == "failed":
            notes.append(f"the CPU ran the model: {swap}")
        if notes:
            facts["notes"] = notes
        return {"summary": _summary(facts, swap), **facts}

    @property
    def status(self) -> str:
        """What is still being made ready while frames flow, or "". For the progress line."""
        swap = self._swap
        return str(swap.state) if swap is not None and swap.state.state == "compiling" else ""

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


def _summary(facts: dict[str, Any], swap: SwapState | None) -> str:
    nodes = ", ".join(f"{count} nodes on {name}" for name, count in facts["nodes"].items())
    text = f"{facts['model']}: {nodes or 'not run'}"
    if nodes:
        text += f" in {facts['precision']}"
    if swap is not None and swap.state == "swapped":
        text += f"; compiled beside the run; swapped at frame {swap.frames}"
    elif swap is not None and swap.state != "failed":
        text += f"; {swap.label} did not take over before the end"
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
