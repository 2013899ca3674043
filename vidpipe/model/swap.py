"""Start at once, get faster: a session that is replaced by a better one between two frames.

The first session is ready. The better one, on a faster provider whose compilation takes
seconds or minutes, is built beside it in a thread; when it is there, the next frame is run on
both. If they agree within one code value of 8 bits, the better one goes on alone; otherwise, or
if it cannot be built, the first one does, and a note says why.

Sessions on a GPU may be swapped too, where both use the same device and stream: both write the
slots' own planes. A CUDA graph cannot be captured while other stages allocate on the device, so
the better session must be one that works without `prepare`, with its graphs switched off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vidpipe.device import Event, Stream
from vidpipe.errors import VidpipeError
from vidpipe.frame import Array, PixelFormat
from vidpipe.model.session import Session

if TYPE_CHECKING:
    from vidpipe.model.cuda import GraphUse


@dataclass(frozen=True, slots=True)
class SwapState:
    """How far the better session is.

    Attributes:
        state: "compiling", "compiled" (it takes over at the next frame), "swapped" or "failed".
        label: what it runs on.
        frames: how many frames the first session ran.
        note: why it failed, or "".
        difference: greatest difference between the two on the frame of the swap, in code
            values of 8 bits; None before.
    """

    state: str
    label: str
    frames: int = 0
    note: str = ""
    difference: float | None = None

    def __str__(self) -> str:
        if self.state == "failed":
            return f"{self.label} not used: {self.note}"
        if self.state == "swapped":
            return f"{self.label} after {self.frames} frames"
        return f"compiling for {self.label}" if self.state == "compiling" else f"{self.label} ready"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-compatible values."""
        return asdict(self)


class SwapSession:
    """Runs one session until a better one is there; itself a `Session`.

    `bind`, `run` and `close` belong to one thread, as in every session; `set_strength` and
    `state` may be called from any.

    Args:
        first: runs the first frames. It is closed when it is replaced, or at the end.
        build: makes the better session, for the same planes. It is called in a thread of its
            own, which outlives `close`: what was begun is finished, so that a cache gets it.
        label: what the better session runs on, for people.
        format: of the output's planes.
        strength: the strength that `first` was made with, if the model has one.

    Attributes:
        error: why the better session cannot be built or run, where that is an error of vidpipe.
    """

    def __init__(
        self,
        first: Session,
        build: Callable[[], Session],
        *,
        label: str,
        format: PixelFormat,
        strength: float | None = None,
    ) -> None:
        self._session = first
        self._tolerance = 1 << (format.bits - 8 + format.shift)
        self._strength = strength
        self._lock = threading.Lock()
        self._outputs: dict[int, Sequence[Array]] = {}
        self._better: Session | None = None
        self._closed = False
        self._state = SwapState("compiling", label)
        self.error: VidpipeError | None = None
        self._thread = threading.Thread(target=self._build, args=(build,), name=f"compile {label}")
        self._thread.start()

    @property
    def state(self) -> SwapState:
        """How far the better session is."""
        return self._state

    def wait(self) -> SwapState:
        """Block until the better session is built, or has failed; the next frame runs on it."""
        self._thread.join()
        return self._state

    def _build(self, build: Callable[[], Session]) -> None:
        try:
            better = build()
        except Exception as error:  # whatever a provider raises must not end the run
            message = error.message if isinstance(error, VidpipeError) else str(error)
            with self._lock:
                self.error = error if isinstance(error, VidpipeError) else None
                self._fail(message.strip().partition("\n")[0] or type(error).__name__)
            return
        with self._lock:
            if not self._closed:
                self._better = better
                self._set("compiled")
                return
        better.close()

    def _set(self, state: str, **changes: Any) -> None:
        old = self._state
        self._state = SwapState(
            state, old.label, changes.get("frames", old.frames), changes.get("note", old.note),
            changes.get("difference", old.difference),
        )  # fmt: skip

    def _fail(self, note: str, difference: float | None = None) -> None:
        self._set("failed", note=note, difference=difference)

    def bind(self, slot: int, outputs: Sequence[Array]) -> None:
        """See `Session.bind`."""
        self._outputs[slot] = outputs
        self._session.bind(slot, outputs)

    def prepare(self) -> GraphUse | None:
        """See `Session.prepare`: makes the first session ready."""
        return self._session.prepare()

    def run(self, slot: int, inputs: Sequence[Array], stream: Stream | None = None) -> Event | None:
        """See `Session.run`; the first frame after the compilation is run on both sessions."""
        event = self._session.run(slot, inputs, stream)
        if self._state.state == "compiling":
            self._set_frames()
            return event
        if self._better is None:
            return event
        return self._swap(slot, inputs, stream, event)

    def _set_frames(self) -> None:
        with self._lock:
            if self._state.state in ("compiling", "compiled"):
                self._set(self._state.state, frames=self._state.frames + 1)

    def _swap(
        self, slot: int, inputs: Sequence[Array], stream: Any, event: Event | None
    ) -> Event | None:
        """Run the frame on the better session too, and keep the one that is to go on."""
        better, self._better = self._better, None
        assert better is not None
        queue = nullcontext() if stream is None else stream
        planes = self._outputs[slot]
        with queue:
            before = [plane.copy() for plane in planes]
        difference = None
        try:
            for index, outputs in self._outputs.items():
                better.bind(index, outputs)
            with self._lock:
                if self._strength is not None:
                    better.set_strength(self._strength)
            after = better.run(slot, inputs, stream)
            with queue:
                worst = max(_difference(a, b) for a, b in zip(before, planes, strict=True))
            difference = worst / self._tolerance
            problem = (
                "" if worst <= self._tolerance else f"its output is {difference:.3g} codes off"
            )
        except VidpipeError as error:
            problem, after = error.message, None
            self.error = error
        if problem:
            with queue:
                for plane, copy in zip(planes, before, strict=True):
                    plane[...] = copy
            with self._lock:
                self._fail(problem, difference)
            better.close()
            return event if stream is None else stream.record()
        with self._lock:
            old, self._session = self._session, better
            if self._strength is not None:
                better.set_strength(self._strength)
            self._set("swapped", difference=difference)
        old.close()
        return after

    def set_strength(self, value: float) -> None:
        """See `Session.set_strength`."""
        with self._lock:
            self._strength = value
            self._session.set_strength(value)

    def nodes_by_provider(self) -> dict[str, int]:
        """See `Session.nodes_by_provider`: of the session that runs now."""
        return self._session.nodes_by_provider()

    def close(self) -> None:
        """See `Session.close`; a compilation that still runs is finished and then dropped."""
        with self._lock:
            self._closed = True
            better, self._better = self._better, None
        if better is not None:
            better.close()
        self._session.close()
        self._outputs.clear()


def _difference(first: Array, second: Array) -> int:
    """Return the greatest absolute difference of two planes of codes."""
    wide = first.astype("int32") - second
    return int(abs(wide).max())
