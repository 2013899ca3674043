"""Windows ML's catalogue of execution providers on Windows 11: `winml:NAME`.

The operating system keeps the providers and may download one on first use. The package
`windowsml` asks its catalogue; the library it names is registered like any plug-in.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidpipe.errors import DeviceError
from vidpipe.providers.base import Provider
from vidpipe.providers.runtime import OFFLINE

_READY = 0

listeners: list[Callable[[str, float], None]] = []
"""Called with a provider's name and 0 to 1 while the system downloads it."""


class _WinMl(Provider):
    name = "winml"
    ep = ""
    title = "Windows ML"
    package = "windowsml"
    install = "pip install windowsml"
    platforms = ("win",)
    # Asking the catalogue may download.
    candidate = False

    def ep_name(self, part: str = "") -> str:
        """Return the catalogue's spelling of a provider's name."""
        with _catalogue(self) as entries:
            return str(_entry(entries, part).name)

    def library(self, part: str = "") -> Path:
        """Return the library of a catalogue entry, downloaded if need be.

        Raises:
            DeviceError: there is no such entry, or it is not there and `--offline` is given.
        """
        with _catalogue(self) as entries:
            entry = _entry(entries, part)
            if int(entry.ready_state) != _READY:
                _make_ready(entry)
            return Path(str(entry.library_path))

    def choose_device(self, devices: Any, part: str, prefer: str) -> Any:  # noqa: ARG002
        """Return a device of the named provider; the name is not a kind of device."""
        return super().choose_device(devices, "", prefer)


def catalogue_entries() -> list[tuple[str, str, bool]]:
    """Return (name, version, ready) of what the catalogue holds; downloads nothing.

    Raises:
        DeviceError: the catalogue cannot be asked.
    """
    with _catalogue(PROVIDER) as entries:
        return [(str(e.name), str(e.version), int(e.ready_state) == _READY) for e in entries]


@contextmanager
def _catalogue(provider: Provider) -> Iterator[list[Any]]:
    assert provider.package is not None
    try:
        catalogue = importlib.import_module(provider.package).EpCatalog()
    except Exception as error:  # ctypes and the system raise errors of many kinds
        raise DeviceError(
            f"the Windows ML catalogue cannot be asked: {error}",
            hint="It needs Windows 11 24H2; or use --device rtx or directml",
        ) from None
    with catalogue:  # its entries live no longer than it does
        yield list(catalogue.find_all_providers())


def _entry(entries: list[Any], name: str) -> Any:
    """Return the entry of a name, whole or its beginning, compared without case."""
    wanted = name.casefold()
    for entry in entries:
        full = str(entry.name).casefold()
        if wanted and full in (wanted, f"{wanted}executionprovider"):
            return entry
    there = ", ".join(str(e.name) for e in entries) or "nothing"
    raise DeviceError(
        f"the Windows ML catalogue has no '{name}'" if name else "which Windows ML provider?",
        hint=f"Use winml:NAME; the catalogue has {there}",
    )


def _make_ready(entry: Any) -> None:
    name = str(entry.name)
    if os.environ.get(OFFLINE):
        raise DeviceError(
            f"{name} is not on this machine, and downloads are off",
            hint="Leave out --offline once, or install a provider's wheel; see vidpipe devices",
        )

    def tell(share: float) -> None:
        for listener in listeners:
            listener(name, share)

    try:
        with entry.ensure_ready_async(on_progress=tell) as work:
            work.wait()
    except OSError as error:
        raise DeviceError(
            f"Windows cannot make {name} ready: {error}",
            hint="Look at Windows Update, or install a provider's wheel; see vidpipe devices",
        ) from None


PROVIDER = _WinMl()
