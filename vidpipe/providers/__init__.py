"""Execution providers: one file each, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points

from vidpipe.device import Device
from vidpipe.errors import DeviceError
from vidpipe.providers.base import Found, Provider, find
from vidpipe.providers.runtime import import_onnxruntime

ENTRY_POINT_GROUP = "vidpipe.providers"

_NO_PROVIDERS = ("base", "runtime")


def known_providers() -> list[str]:
    """Return the names of the providers in this package, sorted, without loading them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NO_PROVIDERS)


def provider(name: str) -> Provider:
    """Return the provider that `--device` calls `name`.

    Raises:
        DeviceError: there is none.
    """
    if name in known_providers():
        module = importlib.import_module(f"{__name__}.{name}")
        found: Provider = module.PROVIDER
        return found
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            other: Provider = entry.load()
            return other
    names = ", ".join(known_providers())
    raise DeviceError(f"device '{name}' is not known", hint=f"Use auto, {names}, or cuda:N")


def all_providers() -> list[Provider]:
    """Return every provider, those of other packages last."""
    others = [entry.load() for entry in entry_points(group=ENTRY_POINT_GROUP)]
    return [*(provider(name) for name in known_providers()), *others]


@dataclass(frozen=True, slots=True)
class Target:
    """What `--device` names: a provider, and which of its devices.

    `Device` is the place of the frames; `place` gives it.

    Attributes:
        provider: its description.
        part: an ordinal, a kind of device such as "npu", a name in a catalogue, or "".
    """

    provider: Provider
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "cpu", "cuda:1", "rtx", "openvino:npu" or "winml:NAME".

        Raises:
            DeviceError: there is no such provider.
        """
        name, colon, part = text.partition(":")
        found = provider(name)
        if (colon and not part) or (name in ("cpu", "cuda", "rtx") and part and not _number(part)):
            raise DeviceError(f"device '{text}' is not known", hint=f"Use {name} or {name}:N")
        return cls(found, part)

    @classmethod
    def of(cls, device: Device) -> Target:
        """Return the provider that works where frames already are."""
        return cls.parse(str(device))

    @property
    def kind(self) -> str:
        """What it most likely runs on, without looking: "cpu", "gpu" or "npu"."""
        return self.provider.usual_kind(self.part)

    @property
    def place(self) -> Device:
        """Where the frames of its models are."""
        return self.provider.place(self.part)

    def find(self, prefer: str = "speed") -> Found:
        """Return the provider ready to be asked for.

        Raises:
            MissingExtraError, DeviceError: it is not there.
        """
        return find(self.provider, import_onnxruntime(), self.part, prefer)

    def __str__(self) -> str:
        return f"{self.provider.name}:{self.part}" if self.part else self.provider.name


CPU_TARGET = Target.parse("cpu")


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
