"""The contracts of sources, stages and sinks, and the registry that names them.

Each of them is one actor: the pipeline calls it from one thread, in this order:

    plan     before anything starts; pure, says what comes out of what goes in
    open     on the actor's own thread: allocate, compile, warm up
    ...      frames
    flush    or `finish` in a sink: the stream has ended, hand out what is held back
    close    always, once, also after an error; lets go of everything

Frames whose `spec` differs from the last one's begin a new part of the stream: the
pipeline flushes the stage and calls `replan`.
"""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from importlib.metadata import entry_points
from typing import Any, TypeVar

from vidpipe.clock import Clock, MonotonicClock
from vidpipe.device import CPU, Device
from vidpipe.errors import GraphError, SpecError, did_you_mean
from vidpipe.frame import Frame, FrameSpec
from vidpipe.link import Policy

ENTRY_POINT_GROUP = "vidpipe.stages"


class _Actor(ABC):  # noqa: B024 - its subclasses have the abstract methods
    name: str = ""
    """The stage's name in the graph; set by the pipeline."""

    clock: Clock = MonotonicClock()
    """The pipeline's clock; set by the pipeline."""

    ring_depth: int = 4
    """Slots that a ring of the actor's output needs; set by the pipeline before `open`."""

    capacity: int | None = None
    """Frames that the link before the actor holds; by default as many as the other links."""

    live: bool = True
    """Whether each frame should be out soon: frames come as they happen, or the actor is called
    by hand. The pipeline sets it before `plan`."""

    holds: int = 0
    """Frames whose planes the actor keeps beyond `process` or `write`, as far as known after
    `plan`."""

    aside_s: float = 0.0
    """Time spent on frames beside the actor's thread, as if it had been spent on it."""

    takes_memory: bool = False
    """Whether the actor takes much GPU memory besides its ring, as a model does."""

    memory_bytes: int | None = None
    """How much of it the actor may take, or None for what is free; set by the pipeline before
    `open` where memory is limited."""

    def open(self) -> None:
        """Allocate, compile and warm up. Called on the actor's thread."""

    def device_for(self, spec: FrameSpec) -> Device:  # noqa: ARG002 - for subclasses
        """Return where a stage or sink takes the planes of such frames.

        The pipeline moves them there when they are elsewhere. By default to the CPU, so a
        stage that knows nothing of devices gets NumPy arrays, ready to be read.
        """
        return CPU

    def stale(self, frame: Frame) -> bool:  # noqa: ARG002 - for subclasses
        """Return whether a frame that waits comes too late.

        Behind a live source it is dropped then. Only asked while a later frame waits too.
        """
        return False

    def close(self) -> None:
        """Let go of everything. Called once on the actor's thread, also after an error."""

    def report(self) -> dict[str, Any]:
        """Return facts for the run's report, JSON-compatible; called after `close`.

        Three keys mean something to the pipeline: "summary" is a short line for people,
        "notes" are lines that the user should know, "problems" are lines that make the run
        one that does not add up.
        """
        return {}


class Source(_Actor):
    """Where frames come from."""

    policy: Policy = Policy.BLOCK
    """What the links behind the source do when they are full. Live sources use LATEST."""

    bundles: bool = False
    """Whether frames come as fast as they are taken and nobody waits for a single one, as with a
    file: then stages may be woken for some at once."""

    bundle: int = 1
    """How many frames had better come at once; set by the pipeline before `open`."""

    expected_frames: int | None = None
    """How many frames will come, as far as known after `plan`; for progress."""

    expected_s: float | None = None
    """Media time that the frames will cover, as far as known after `plan`; for progress."""

    @abstractmethod
    def plan(self) -> FrameSpec:
        """Return what the frames will be."""

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """Yield frames with strictly rising pts until the stream ends or `stop` is called."""

    def stop(self) -> None:
        """End `frames` at the next frame. Called from another thread."""


class Stage(_Actor):
    """Frames in, frames out."""

    @abstractmethod
    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Return what comes out when `spec` goes in.

        Raises:
            SpecError: the stage cannot take such frames.
        """

    @abstractmethod
    def process(self, frame: Frame) -> Iterable[Frame]:
        """Take one frame, give none, one or many."""

    wake: Callable[[], None] = staticmethod(lambda: None)
    """Asks the pipeline to call `ready`, from any thread; set by the pipeline before `open`."""

    def ready(self) -> Iterable[Frame]:
        """Give the frames that are done meanwhile. Called after `wake`, between frames."""
        return ()

    def flush(self) -> Iterable[Frame]:
        """Give the frames still held back; the stream has ended."""
        return ()

    def replan(self, spec: FrameSpec) -> FrameSpec:
        """Go on with other frames; called after `flush`. Returns what comes out from now."""
        self.close()
        out = self.plan(spec)
        self.open()
        return out


class Sink(_Actor):
    """Where frames go."""

    policy: Policy = Policy.BLOCK
    """What the link before the sink does when it is full. Live sinks use LATEST, so that one
    that stalls does not hold up the others."""

    def attach(self, source: Source) -> None:
        """Learn which source feeds this sink; called before `plan`."""

    @abstractmethod
    def plan(self, spec: FrameSpec) -> None:
        """Check that such frames can be taken.

        Raises:
            SpecError, OutputError: they cannot.
        """

    @abstractmethod
    def write(self, frame: Frame) -> None:
        """Take one frame."""

    def finish(self) -> None:
        """All frames were written: make the output complete. Not called after an error."""

    def replan(self, spec: FrameSpec) -> None:
        """Go on with other frames. By default they must be plannable like the first."""
        self.plan(spec)


class FrameSource(Source):
    """Frames from any iterable.

    Args:
        spec: what the first frame is; later ones may differ.
        frames: frames with strictly rising pts.
    """

    def __init__(self, spec: FrameSpec, frames: Iterable[Frame]) -> None:
        self.spec = spec
        self._frames = frames
        self._stopped = False

    def plan(self) -> FrameSpec:
        """Return the first frame's spec."""
        return self.spec

    def frames(self) -> Iterator[Frame]:
        """Yield the frames.

        Raises:
            SpecError: pts does not rise.
        """
        last: Fraction | None = None
        for frame in self._frames:
            if self._stopped:
                return
            time = frame.pts * frame.spec.time_base
            if last is not None and time <= last:
                raise SpecError(
                    f"frame with pts {frame.pts} comes after one that is not earlier",
                    hint="Give frames in order, with strictly rising pts",
                )
            last = time
            yield frame

    def stop(self) -> None:
        """End at the next frame."""
        self._stopped = True


_QUEUED = 8


class Null(Sink):
    """Takes frames where they are and keeps nothing: for measuring.

    A few frames on a GPU may be queued there still while it takes the next, as with an encoder.
    """

    def __init__(self) -> None:
        self._queued: deque[Frame] = deque()

    def device_for(self, spec: FrameSpec) -> Device:
        """Take frames where they are."""
        return spec.device

    def plan(self, spec: FrameSpec) -> None:
        """Take anything."""
        self.holds = 0 if spec.device == CPU else _QUEUED

    def write(self, frame: Frame) -> None:
        """Let go of the frame, on a GPU when it is finished."""
        if frame.ready is None:
            return
        queued = self._queued
        queued.append(frame)
        if len(queued) > _QUEUED:
            first = queued[0].ready
            if first is not None and not first.done:
                queued[-2].synchronize()  # one wait for all but the last
            queued.popleft()

    def finish(self) -> None:
        """Wait for the last frames."""
        while self._queued:
            self._queued.popleft().synchronize()

    def close(self) -> None:
        """Let go of the last frames."""
        self._queued.clear()


Actor = Source | Stage | Sink
ActorClass = type[Source] | type[Stage] | type[Sink]

_registry: dict[str, ActorClass] = {}
_T = TypeVar("_T", bound=ActorClass)

# Named here, not imported: a graph is checked before the heavy modules are loaded.
_BUILT_IN = {
    "capture": "vidpipe.live.capture:Capture",
    "decode": "vidpipe.media.decode:Decode",
    "encode": "vidpipe.media.encode:Encode",
    "enhance": "vidpipe.live.enhance:Enhance",
    "function": "vidpipe.function:Function",
    "model": "vidpipe.model.stage:Model",
    "null": "vidpipe.stage:Null",
    "page": "vidpipe.live.page:Page",
    "record": "vidpipe.live.outputs:Record",
    "resize": "vidpipe.media.resize:Resize",
    "stream": "vidpipe.live.outputs:StreamOut",
    "transfer": "vidpipe.transfer:Transfer",
    "virtual-camera": "vidpipe.live.virtualcam:VirtualCamera",
}


def register(name: str) -> Callable[[_T], _T]:
    """Return a class decorator that makes a stage usable in graphs as `use = name`.

    Other packages can also name their classes under the entry-point group
    "vidpipe.stages".
    """

    def decorate(cls: _T) -> _T:
        _registry[name] = cls
        return cls

    return decorate


def known_stages() -> list[str]:
    """Return the names that `use` can take, sorted."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    return sorted({*_BUILT_IN, *_registry, *(e.name for e in found)})


def stage_class(name: str) -> ActorClass:
    """Return the class that a graph calls `name`.

    Raises:
        GraphError: nothing of that name is registered.
    """
    if name in _registry:
        return _registry[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        import importlib

        _registry[name] = getattr(importlib.import_module(module), attribute)
        return _registry[name]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            _registry[name] = entry.load()
            return _registry[name]
    raise GraphError(f"no stage is called '{name}'", hint=did_you_mean(name, known_stages()))


def options_of(cls: ActorClass) -> dict[str, tuple[Any, bool]]:
    """Return the options of a stage class: name -> (type, required).

    They are the keyword parameters of its constructor.
    """
    hints = typing.get_type_hints(cls.__init__)
    return {
        p.name: (hints.get(p.name, Any), p.default is inspect.Parameter.empty)
        for p in inspect.signature(cls).parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
