"""The models of a live graph as one stage: tiers, governor and controls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from vidpipe.device import CPU, Device, Event, Ring, Slot, import_cupy, new_stream, setup_lock
from vidpipe.errors import InputError, ModelError, SpecError
from vidpipe.frame import Array, Frame, FrameSpec
from vidpipe.live.controls import AUTO, Controls, Settings
from vidpipe.live.governor import Governor
from vidpipe.media.convert import Converter, frame_from, planes_of
from vidpipe.model.descriptor import MODELS, describe, find_model
from vidpipe.model.stage import Model
from vidpipe.model.variant import check_precision, int8_copy
from vidpipe.stage import Stage, register

PLAIN = "scale"
"""The last tier: plain scaling, no model."""

DEFAULT_TIERS = ("clean-2x-quality", "clean-2x-fast", "clean-2x-nano")


@dataclass(slots=True)
class Enhanced(Frame):
    """A frame that went through the enhance stage.

    Attributes:
        before: the frame as it came, on the device that it came on, for comparisons; None
            behind other stages.
        enhanced_s: the pipeline's clock when it left the stage.
    """

    before: Frame | None = None
    enhanced_s: float = 0.0

    def replace(
        self,
        planes: Sequence[Array],
        spec: FrameSpec,
        *,
        slot: Slot | None = None,
        ready: Event | None = None,
    ) -> Frame:
        """See `Frame.replace`. On another device it is the same picture, and stays enhanced."""
        other = Frame.replace(self, planes, spec, slot=slot, ready=ready)
        if spec.device == self.spec.device:
            return other
        return Enhanced(
            other.planes,
            spec,
            other.pts,
            other.duration,
            other.captured_s,
            other.side_data,
            ready,
            slot,
            before=self.before,
            enhanced_s=self.enhanced_s,
        )


@register("enhance")
class Enhance(Stage):
    """Runs the best model that keeps the latency budget.

    Every tier has a warm session of its own, so that a change of tier costs nothing. All of
    them give the same size and format; plain scaling to it is always the last tier.

    Args:
        tiers: models, best first: built-in names or paths of ONNX files.
        latency_budget_s: from capture to sink; the governor steps down to keep it.
        tier: the tier to begin with and stay at, or "auto" for the governor's choice.
        strength: 0 to 1; the model's own strength input, or how much of its result is mixed
            into the plainly scaled picture.
        device: as for the model stage.
        precision: as for the model stage; "int8" holds for the tiers that have such a copy, see
            `tier_precisions`.
        chosen: why this device was chosen, for the report.
        threads: as for the model stage.

    `before` of the frames that come out holds the frame that went in. On a GPU frames stay
    there, and are ready when they come out: the stage waits for each, for its latency.
    """

    takes_memory = True
    capacity = 3
    """Frames may wait for as long as the budget allows, so that a hiccup of the machine costs time
    and no frame; see `stale`."""

    def __init__(
        self,
        *,
        tiers: list[str] | None = None,
        latency_budget_s: float = 0.1,
        tier: str = AUTO,
        strength: float = 1.0,
        device: str = "auto",
        precision: str = "auto",
        chosen: str = "",
        threads: int = 0,
    ) -> None:
        check_precision(precision)
        if not 0 < latency_budget_s <= 10:
            raise InputError(
                f"the latency budget is {latency_budget_s} s", hint="Expected more than 0, up to 10"
            )
        models = [t for t in (DEFAULT_TIERS if tiers is None else tiers) if t != PLAIN]
        self.budget_s = latency_budget_s
        self.device = device
        self.precision = precision
        self.chosen = chosen
        self.tiers = [*models, PLAIN]
        # Whatever has to be compiled is compiled before the first frame.
        self.models = [
            Model(model=m, device=device, threads=threads, wait_compile=True) for m in models
        ]
        self.controls = Controls(self.tiers)
        self.controls.change({"tier": tier, "strength": strength})
        self.governor: Governor | None = None
        self.notify: Callable[[dict[str, Any]], None] = lambda _event: None
        self.costs_s: list[float] = []
        self._applied: Settings | None = None
        self._tier: int | None = None
        self._pair: tuple[Frame, Frame] | None = None
        self._scaler: Converter | None = None
        self._gaps: deque[float] = deque(maxlen=31)
        self._last_captured_s: float | None = None
        self._steps = 0
        self._stream: Any = None
        self._ring: Ring | None = None
        self._provider = ""
        self._precisions: list[str] = []
        self._said = False

    def device_for(self, spec: FrameSpec) -> Device:
        """Return where the models take frames; without a model, where they are."""
        return self.models[0].device_for(spec) if self.models else spec.device

    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Return what every tier makes of such frames.

        Raises:
            SpecError: the tiers do not agree.
            ModelError: a model cannot be used, or none has a copy in int8.
        """
        self._spec = spec
        asked = tier_precisions(self.tiers[:-1], self.precision)
        for model, precision in zip(self.models, asked, strict=True):
            model.precision = precision
        outs = [model.plan(spec) for model in self.models]
        self._out = outs[0] if outs else spec
        for name, out in zip(self.tiers, outs, strict=False):
            if out != self._out:
                raise SpecError(
                    f"tier '{name}' makes {out}, but '{self.tiers[0]}' makes {self._out}",
                    hint="Choose models of the same scale",
                )
        return self._out

    def open(self) -> None:
        """Open and warm up every tier, and measure what a frame costs in it.

        Raises:
            ModelError, SpecError, DeviceError: as for the model stage.
        """
        out = self._out
        if out.device == CPU:
            self._scaler = Converter(out.width, out.height, out.format.name, "bicubic", threads=1)
        else:
            self._stream = new_stream(out.device)
            shapes = [(shape, out.format.dtype) for shape in out.plane_shapes()]
            self._ring = Ring(shapes, self.ring_depth, out.device)
        for model in self.models:
            # One picture more is kept for snapshots and freezing.
            model.ring_depth = self.ring_depth + 1
            if self.memory_bytes is not None:
                model.memory_bytes = self.memory_bytes // len(self.models)
            model.open()
        self._provider = self._providers()
        self._precisions = [str(model.report()["precision"]) for model in self.models]
        self._say_precision()
        with self._queued():
            sample = _grey(self._spec)
        self.costs_s = [self._cost(tier, sample) for tier in range(len(self.tiers))]
        interval_s = float(1 / self._spec.rate) if self._spec.rate else 1 / 30
        self.governor = Governor(self.costs_s, self.budget_s, self.clock, interval_s)
        self._tier = None
        self._applied = None

    def _say_precision(self) -> None:
        """Announce once which tiers do not run in int8 although it was asked for."""
        others = {n: p for n, p in zip(self.tiers, self._precisions, strict=False) if p != "int8"}
        if self.precision != "int8" or not others or self._said:
            return
        self._said = True
        listed = ", ".join(f"{name} in {precision}" for name, precision in others.items())
        self.notify(
            {
                "event": "precision",
                "filter": self.name,
                "reason": f"not every tier has a copy in int8: {listed}",
            }
        )

    def _cost(self, tier: int, sample: Frame) -> float:
        costs: list[float] = []
        # The first run may take several times as long as the next. A tier that is too slow for
        # anything is not run so often: it would only delay the start.
        while len(costs) < 4 and sum(costs) < 10 * self.budget_s:
            start_s = self.clock.now_s()
            self._run(tier, sample)
            costs.append(self.clock.now_s() - start_s)
        return min(costs)  # whatever disturbs a measurement makes it longer

    def close(self) -> None:
        """Close every tier."""
        self._pair = self._ring = self._stream = None
        for model in self.models:
            model.close()

    def replan(self, spec: FrameSpec) -> FrameSpec:
        """Go on with other frames: every tier is opened anew."""
        with nullcontext() if spec.device == CPU else setup_lock:
            return super().replan(spec)

    def stale(self, frame: Frame) -> bool:
        """Return whether a frame that waits is likely to miss the budget."""
        governor = self.governor
        if governor is None:
            return False
        spent_s = self.clock.now_s() - frame.captured_s
        left_s = governor.costs_s[self._tier or 0] + governor.downstream_s
        return spent_s + left_s > governor.ROOM * self.budget_s

    def process(self, frame: Frame) -> Iterable[Frame]:
        """Enhance one frame, as the controls say."""
        assert self.governor is not None
        settings = self.controls.settings
        self._follow(settings)
        self._pace(frame)
        cost_s = None
        if settings.frozen and self._pair is not None:
            before, after = self._pair
        else:
            tier = self._choose(settings)
            start_s = self.clock.now_s()
            before, after = frame, self._run(tier, frame)
            cost_s = self.clock.now_s() - start_s
            if settings.strength < 1 and tier < len(self.models) and not self._has_strength(tier):
                with self._queued(frame):
                    mixed = mix(self.plain(frame), after.planes, settings.strength)
                after = frame.replace(mixed, self._out)
            self._pair = (before, after)
        planes, slot = after.planes, after.slot if cost_s is not None else None
        if settings.wipe is not None:
            with self._queued(before):
                planes, slot = wipe(self.plain(before), planes, settings.wipe), None
        if self._ring is not None and slot is None:
            slot, planes = self._kept(self._ring, planes)
        now_s = self.clock.now_s()
        out = Enhanced(
            planes,
            self._out,
            frame.pts,
            frame.duration,
            frame.captured_s,
            frame.side_data,
            slot=slot,
            before=before,
            enhanced_s=now_s,
        )
        if settings.tier == AUTO and settings.enabled and not settings.frozen:
            step = self.governor.observe(now_s - frame.captured_s, cost_s)
            if step is not None:
                self._announce(step.source, step.target, step.reason)
        return (out,)

    def _follow(self, settings: Settings) -> None:
        """Tell the models and the announcements what the controls say now."""
        last = self._applied
        if settings is last:
            return
        if last is None or settings.strength != last.strength:
            for tier, model in enumerate(self.models):
                if self._has_strength(tier):
                    model.set_strength(settings.strength)
        assert self.governor is not None
        if last is not None and settings.tier == AUTO != last.tier:
            self.governor.restart(self._tier if self._tier is not None else self.governor.tier)
        self._applied = settings

    def _has_strength(self, tier: int) -> bool:
        return self.models[tier].descriptor.strength is not None

    def _choose(self, settings: Settings) -> int:
        """Return the tier of this frame; announce it where nobody has yet."""
        assert self.governor is not None
        if not settings.enabled:
            return len(self.tiers) - 1
        tier = self.governor.tier if settings.tier == AUTO else self.tiers.index(settings.tier)
        if self._tier is not None and tier != self._tier and settings.tier != AUTO:
            self._announce(self._tier, tier, "chosen")
        self._tier = tier
        return tier

    def _announce(self, source: int, target: int, reason: str) -> None:
        self._tier = target
        self._steps += 1
        self.notify(
            {
                "event": "tier",
                "filter": self.name,
                "from": self.tiers[source],
                "to": self.tiers[target],
                "reason": reason,
            }
        )

    def _pace(self, frame: Frame) -> None:
        """Learn the source's frame interval, for the governor's forecast."""
        assert self.governor is not None
        if self._spec.rate is None and self._last_captured_s is not None:
            self._gaps.append(frame.captured_s - self._last_captured_s)
            self.governor.interval_s = max(median(self._gaps), 0.001)
        self._last_captured_s = frame.captured_s

    def _run(self, tier: int, frame: Frame) -> Frame:
        if tier == len(self.models):
            with self._queued(frame):
                return frame.replace(self.plain(frame), self._out)
        (out,) = self.models[tier].process(frame)
        # Latency is what this stage is about: the figures must not end before the work.
        out.synchronize()
        return out

    @contextmanager
    def _queued(self, *frames: Frame) -> Iterator[None]:
        """Queue on a GPU what the block does, behind these frames, and wait for it."""
        if self._stream is None:
            yield
            return
        for frame in frames:
            frame.wait(self._stream)
        with self._stream:
            yield
        self._stream.synchronize()

    def _kept(self, ring: Ring, planes: tuple[Array, ...]) -> tuple[Slot, tuple[Array, ...]]:
        """Return a copy in the ring: a slot knows who still reads it, memory of a pool does not."""
        slot, targets = ring.lease()
        with self._queued():
            slot.write_by(self._stream)
            for source, target in zip(planes, targets, strict=True):
                target[...] = source
        return slot, targets

    def plain(self, frame: Frame) -> tuple[Array, ...]:
        """Return the frame's picture, scaled to the output size without a model.

        Returns:
            Planes of the output spec on its device. On a GPU pixels are repeated; on the CPU
            libswscale's bicubic kernel is used. On a GPU they are queued on the current stream.
        """
        spec, out = frame.spec, self._out
        if (spec.width, spec.height, spec.format) == (out.width, out.height, out.format):
            return frame.planes
        if spec.device.kind != "cpu":
            n = out.width // spec.width
            return tuple(p.repeat(n, 0).repeat(n, 1) for p in frame.planes)
        assert self._scaler is not None
        picture = self._scaler(frame_from(frame.planes, spec.format), spec.resolved_color())
        return planes_of(picture, out.format)

    def pair(self) -> tuple[Frame, Frame] | None:
        """Return the last frame before and after; the picture after has no wipe in it."""
        return self._pair

    @property
    def tier(self) -> str:
        """The tier in use."""
        return self.tiers[self._tier if self._tier is not None else -1]

    def provider(self) -> str:
        """Return device and execution provider of the models, one line; "" before `open`."""
        return self._provider

    @property
    def precision_now(self) -> str | None:
        """What the tier in use computes in; None for plain scaling."""
        tier = len(self.models) if self._tier is None else self._tier
        return self._precisions[tier] if tier < len(self._precisions) else None

    def _providers(self) -> str:
        found = set()
        for model in self.models:
            facts = model.report()
            found |= {f"{facts['device']} ({provider})" for provider in facts["nodes"]}
        return ", ".join(sorted(found)) or "cpu (no model)"

    def report(self) -> dict[str, Any]:
        """Return tiers, costs and steps."""
        return {
            "summary": f"{self.tier}, {self._steps} changes of tier",
            "tiers": self.tiers,
            "costs_s": [round(c, 5) for c in self.costs_s],
            "steps": self._steps,
            "provider": self._provider,
            "precisions": list(self._precisions),
            "chosen": self.chosen or None,
            "models": [model.report()["summary"] for model in self.models],
            **self.controls.settings.to_dict(),
        }


def tier_precisions(models: Sequence[str], precision: str) -> list[str]:
    """Return the `precision` of each tier's model stage.

    It is the one asked for. Only int8 needs a copy of the model, which not every model has:
    the tiers without one run in what "auto" means for them.

    Args:
        models: built-in names or paths of ONNX files.
        precision: as for the model stage.

    Raises:
        ModelError: int8 was asked for, and no tier has it; a model cannot be used.
    """
    if precision != "int8" or not models:
        return [precision] * len(models)
    found = [describe(find_model(model)) for model in models]
    able = [d.precision == "int8" or int8_copy(d) is not None for d in found]
    if not any(able):
        shipped = sorted(path.stem for path in (MODELS / "int8").glob("*.onnx"))
        raise ModelError(
            f"no tier has a copy in int8: {', '.join(models)}",
            hint=f"Use {', '.join([*shipped, 'another precision'])}, or make a copy with: "
            "vidpipe models quantize MODEL --calibrate CLIP",
        )
    return ["int8" if one else "auto" for one in able]


def mix(before: tuple[Array, ...], after: tuple[Array, ...], weight: float) -> tuple[Array, ...]:
    """Return before + weight * (after - before), rounded, in steps of 1/256.

    Args:
        before, after: planes of the same shapes and dtype, uint8 or uint16.
        weight: 0 to 1.
    """
    k = round(weight * 256)
    mixed = []
    for a, b in zip(before, after, strict=True):
        wide = np.uint16 if b.dtype == np.uint8 else np.uint32
        total = a.astype(wide)
        total *= wide(256 - k)
        total += b.astype(wide) * wide(k)
        total += wide(128)
        total >>= wide(8)
        mixed.append(total.astype(b.dtype))
    return tuple(mixed)


def wipe(before: tuple[Array, ...], after: tuple[Array, ...], position: float) -> tuple[Array, ...]:
    """Return a picture that shows `before` left of the position and `after` right of it.

    Args:
        before, after: planes of the same shapes and dtype; the first is luma or G.
        position: 0 to 1 of the width. A bright line of two pixels marks it.
    """
    width = after[0].shape[1]
    edge = round(position * width)
    pictures = []
    for a, b in zip(before, after, strict=True):
        plane = b.copy()
        x = -(-edge * plane.shape[1] // width)
        plane[:, :x] = a[:, :x]
        pictures.append(plane)
    if 0 < edge < width:
        luma = pictures[0]
        luma[:, max(edge - 1, 0) : edge + 1] = np.iinfo(luma.dtype).max * 15 // 16
    return tuple(pictures)


def _grey(spec: FrameSpec) -> Frame:
    """Return a frame of the middle code value, on the spec's device."""
    library: Any = np if spec.device == CPU else import_cupy(spec.device)
    value = 1 << (spec.format.bits - 1 + spec.format.shift)
    planes = [library.full(s, value, spec.format.dtype) for s in spec.plane_shapes()]
    return Frame(tuple(planes), spec, 0)
