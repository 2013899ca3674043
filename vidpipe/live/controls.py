"""What can be changed while a filter runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vidpipe.errors import InputError, did_you_mean

AUTO = "auto"
"""The tier that leaves the choice to the governor."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The state of one filter's controls.

    Attributes:
        enabled: off passes the picture on, scaled plainly to the same size.
        strength: 0 to 1, how much the model changes the picture.
        tier: name of a tier, or "auto".
        wipe: None, or the part of the width, 0 to 1, that shows the picture before.
        frozen: the last picture stays.
    """

    enabled: bool = True
    strength: float = 1.0
    tier: str = AUTO
    wipe: float | None = None
    frozen: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        return asdict(self)


class Controls:
    """The settings of one filter; read by its thread, changed from others.

    Args:
        tiers: names that `tier` takes besides "auto".
        settings: what to begin with.
    """

    def __init__(self, tiers: list[str], settings: Settings | None = None) -> None:
        self.tiers = list(tiers)
        self._settings = settings or Settings()
        self._lock = threading.Lock()

    @property
    def settings(self) -> Settings:
        """The settings now; one consistent snapshot."""
        return self._settings

    def change(self, changes: Mapping[str, Any]) -> Settings:
        """Apply all of the changes or, if one is wrong, none.

        Args:
            changes: names of `Settings` and their new values.

        Raises:
            InputError: a name is unknown, or a value is of the wrong type or out of range.
        """
        checked = {key: self._checked(key, value) for key, value in changes.items()}
        with self._lock:
            self._settings = replace(self._settings, **checked)
            return self._settings

    def _checked(self, key: str, value: Any) -> Any:
        if key in ("enabled", "frozen"):
            if not isinstance(value, bool):
                raise InputError(f"{key} is {_brief(value)}, expected true or false")
            return value
        if key in ("strength", "wipe"):
            if key == "wipe" and value is None:
                return None
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not 0 <= value <= 1:
                raise InputError(f"{key} is {_brief(value)}, expected a number from 0 to 1")
            return float(value)
        if key == "tier":
            known = [AUTO, *self.tiers]
            if value not in known:
                raise InputError(f"tier is {_brief(value)}", hint="Known: " + ", ".join(known))
            return value
        raise InputError(
            f"no control is called {_brief(key)}", hint=did_you_mean(key, [*Settings().to_dict()])
        )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
