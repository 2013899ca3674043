"""Single keys in the terminal while a filter runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vidpipe.live.controls import AUTO, Settings

HELP = (
    "space on/off  +/- strength  t tier  w wipe  [ ] move it  f freeze  s snapshot  n next filter"
    "  q quit"
)

QUIT, SNAPSHOT, NEXT = "quit", "snapshot", "next"
_STEP = 0.05


def command_for(key: str, settings: Settings, tiers: Sequence[str]) -> str | dict[str, Any] | None:
    """Return what a key means.

    Args:
        key: one character.
        settings: as they are.
        tiers: of the filter.

    Returns:
        Changes for the controls, one of QUIT, SNAPSHOT and NEXT, or None for other keys.
    """
    words = {"q": QUIT, "\x03": QUIT, "s": SNAPSHOT, "n": NEXT}
    if key in words:
        return words[key]
    if key == " ":
        return {"enabled": not settings.enabled}
    if key == "f":
        return {"frozen": not settings.frozen}
    if key in "+=" or key == "-":
        step = -_STEP if key == "-" else _STEP
        return {"strength": _clamp(settings.strength + step)}
    if key == "t":
        names = [AUTO, *tiers]
        return {"tier": names[(names.index(settings.tier) + 1) % len(names)]}
    if key == "w":
        return {"wipe": 0.5 if settings.wipe is None else None}
    if key in "[]" and settings.wipe is not None:
        return {"wipe": _clamp(settings.wipe + (_STEP if key == "]" else -_STEP))}
    return None


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, round(value, 2)))


@contextmanager
def listening(take: Callable[[str], None]) -> Iterator[bool]:
    """Call `take` with every key pressed, on a thread, as long as the block runs.

    Yields:
        Whether keys can be read: standard input is a terminal.
    """
    if not sys.stdin.isatty():
        yield False
        return
    stop = threading.Event()
    reader = _windows_keys if sys.platform == "win32" else _posix_keys
    with _single_keys():

        def run() -> None:
            for key in reader(stop):
                take(key)

        thread = threading.Thread(target=run, name="vidpipe-keys", daemon=True)
        thread.start()
        try:
            yield True
        finally:
            stop.set()
            thread.join(1)


@contextmanager
def _single_keys() -> Iterator[None]:
    """Let the terminal give keys one by one, without showing them; Ctrl-C stays a signal."""
    if sys.platform == "win32":
        yield
    else:
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)
        try:
            tty.setcbreak(sys.stdin)
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _posix_keys(stop: threading.Event) -> Iterator[str]:
    import os
    import select

    while not stop.is_set():
        ready, _, _ = select.select([sys.stdin], [], [], 0.2)
        if ready:
            data = os.read(sys.stdin.fileno(), 64)
            if not data:
                return
            yield from data.decode(errors="replace")


def _windows_keys(stop: threading.Event) -> Iterator[str]:
    if sys.platform == "win32":
        import msvcrt

        while not stop.wait(0.05):
            while msvcrt.kbhit():
                yield msvcrt.getwch()
    else:
        yield from ()
