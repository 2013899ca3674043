"""Every error that vidpipe raises on purpose.

    VidpipeError                 exit code 1
    ├── InputError               2   something given to vidpipe cannot be used
    │   ├── GraphError               a graph file or an override is wrong
    │   ├── MediaError               a file cannot be read as video
    │   ├── ModelError               a model file cannot be used
    │   └── SpecError                a stage cannot take the frames it is given
    ├── OutputError              2   the output cannot be written
    ├── DeviceError              3   the device or provider asked for is not there
    │   └── MissingExtraError        an optional package is not installed
    ├── VerificationError        4   a run ended, but its report does not add up
    └── Cancelled              130   stopped by the user before anything was kept

A message is one line: what was got, what is supported, what to do. The hint, where there
is one, is the thing to type or change.
"""

from __future__ import annotations


class VidpipeError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: one line, no trailing full stop needed by the caller.
        hint: what to do about it, or None.
        stage: name of the stage that failed, or None outside a pipeline.
        time_s: media time in seconds of the frame at hand, or None.
        exit_code: what the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.stage: str | None = None
        self.time_s: float | None = None

    def at(self, stage: str, time_s: float | None = None) -> VidpipeError:
        """Note where the error happened, unless a deeper place is already noted."""
        if self.stage is None:
            self.stage = stage
            self.time_s = time_s
        return self

    def __str__(self) -> str:
        where = ""
        if self.stage is not None:
            where = f"stage '{self.stage}'"
            if self.time_s is not None:
                where += f" at {self.time_s:.3f} s"
            where += ": "
        hint = f". {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


class InputError(VidpipeError):
    """Something given to vidpipe cannot be used."""

    exit_code = 2


class GraphError(InputError):
    """A graph file, or an override of one of its keys, is wrong."""


class MediaError(InputError):
    """A file cannot be read as video."""


class ModelError(InputError):
    """A model file cannot be used."""


class SpecError(InputError):
    """A stage cannot take the frames that its link would bring."""


class OutputError(VidpipeError):
    """The output cannot be written."""

    exit_code = 2


class DeviceError(VidpipeError):
    """The device or execution provider asked for is not there."""

    exit_code = 3


class DeviceMemoryError(DeviceError):
    """The memory of a device, or the limit put on it, does not suffice."""


class MissingExtraError(DeviceError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"'{package}' is not installed",
            hint=f"Install it with: pip install 'vidpipe[{extra}]'",
        )


class VerificationError(VidpipeError):
    """A run ended, but its report does not add up."""

    exit_code = 4


class Cancelled(VidpipeError):
    """The user stopped the run before anything was kept."""

    exit_code = 130


def did_you_mean(word: str, known: list[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or the list of known words."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    return "Known: " + ", ".join(sorted(known)) if known else ""
