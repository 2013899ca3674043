"""What an execution provider is to vidpipe: how it is found, registered and configured.

A provider is one file of this package that ends in `PROVIDER = ...`, an instance of a
subclass of `Provider`. Another package may name such an instance under the entry-point group
"vidpipe.providers".

There are three ways to be found:

    built in       ONNX Runtime lists it in `get_available_providers()`
    plug-in        a wheel with a library, registered by
                   `register_execution_provider_library`; its devices are then among
                   `get_ep_devices()`
    a catalogue    the operating system knows the library (Windows ML)

ONNX Runtime itself falls back to the CPU in silence when a plug-in has no device, so a
provider without a device counts as missing here, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidpipe.device import CPU, Device
from vidpipe.errors import DeviceError
from vidpipe.providers.runtime import first_line

PREFERENCES = ("speed", "latency", "efficiency")
"""What `--prefer` takes: frames a second, time of one frame, or little power."""

_KINDS = {"latency": ("gpu", "npu", "cpu"), "efficiency": ("npu", "gpu", "cpu")}
_register_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a session is to be configured for.

    Attributes:
        prefer: "speed", "latency" or "efficiency".
        threads: of one operator on the CPU; at least 1.
        index: ordinal of a GPU.
        kind: "cpu", "gpu" or "npu": what the chosen device of a plug-in is.
        cache: folder for a provider's own cache, or None.
    """

    prefer: str = "speed"
    threads: int = 1
    index: int = 0
    kind: str = "cpu"
    cache: Path | None = None


class Provider:
    """Describes one execution provider. Subclasses set the attributes and override `options`.

    Attributes:
        name: what `--device` takes.
        ep: as ONNX Runtime calls it; compared without case.
        title: for people.
        memory: where its arrays are, "cpu" (NumPy) or "cuda" (CuPy).
        kind: what it mostly runs on, "cpu", "gpu" or "npu".
        package: the module of a plug-in's wheel, or None when it is built into ONNX Runtime.
        install: the line that installs it.
        platforms: beginnings of `sys.platform` on which it exists; all if empty.
        portable, half, widen: how `compile_model` is to write the graph for it.
        graph_option, graph_id: provider option that switches CUDA graphs on, and run option
            that names one; "" without CUDA graphs.
        cache_option: provider option that takes a folder for its runtime cache, or "".
        context: whether it writes EP context files.
        candidate: whether `--device auto` may choose it.
        lanes: frames that one session best runs at once, sharing the threads out, where the rate
            counts and not how soon a frame is out.
    """

    name: str = ""
    ep: str = ""
    title: str = ""
    memory: str = "cpu"
    kind: str = "gpu"
    package: str | None = None
    install: str = ""
    platforms: tuple[str, ...] = ()
    portable: bool = True
    half: bool = False
    widen: bool = True
    graph_option: str = ""
    graph_id: str = ""
    cache_option: str = ""
    context: bool = False
    candidate: bool = True
    lanes: int = 1

    def options(self, request: Request) -> dict[str, str]:
        """Return the provider options for a request, without the stream and the graph."""
        return {self.cache_option: str(request.cache)} if self.caches(request) else {}

    @property
    def keeps(self) -> bool:
        """Whether something of a session may be kept in the cache."""
        return self.context or bool(self.cache_option)

    def caches(self, request: Request) -> bool:
        """Return whether the request gives the provider's own cache a folder."""
        return bool(self.cache_option) and request.cache is not None

    def configure(self, options: Any, request: Request) -> None:
        """Set what the provider needs on `onnxruntime.SessionOptions`; nothing by default."""

    def installed(self) -> bool:
        """Return whether its files may be there. Loads nothing."""
        if not self.here():
            return False
        package = self.package or "onnxruntime"
        try:
            return importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            return False

    def here(self) -> bool:
        """Return whether the provider exists for this operating system."""
        return not self.platforms or sys.platform.startswith(self.platforms)

    def prepare(self, package: Path) -> None:
        """Make ready what the library needs before it is loaded; nothing by default."""

    def library(self, part: str = "") -> Path:  # noqa: ARG002 - for subclasses
        """Return the path of the plug-in's library.

        Args:
            part: what follows the name in `--device`, for providers that take it.

        Raises:
            DeviceError: it cannot be had; the message says why.
        """
        assert self.package is not None
        try:
            module = importlib.import_module(self.package)
            find = getattr(module, "get_library_path", None) or module.library_path
            path = Path(str(find()))
            self.prepare(path.parent)
        except Exception as error:  # whatever a wheel's own code raises
            raise DeviceError(
                f"'{self.package}' is installed but does not load: {first_line(error)}",
                hint=f"Install it again: {self.install}",
            ) from None
        return path

    def ep_name(self, part: str = "") -> str:  # noqa: ARG002 - for subclasses
        """Return the name by which the devices are found."""
        return self.ep

    def choose_device(self, devices: Sequence[Any], part: str, prefer: str) -> Any:
        """Return which of a plug-in's devices is used.

        Args:
            devices: `OrtEpDevice`s of this provider, at least one.
            part: a kind, "cpu", "gpu" or "npu", or an ordinal; "" leaves it to the preference.
            prefer: see `PREFERENCES`.

        Raises:
            DeviceError: there is no such device.
        """
        if part.isdecimal() and int(part) < len(devices):
            return devices[int(part)]
        if part:
            matching = [d for d in devices if device_kind(d) == part.lower()]
            if not matching:
                found = ", ".join(sorted({device_kind(d) for d in devices}))
                raise DeviceError(
                    f"{self.name} has no device '{part}' here",
                    hint=f"Use {self.name}:KIND with one of {found}",
                )
            return matching[0]
        order = _KINDS.get(prefer, _KINDS["latency"])
        return min(devices, key=lambda d: order.index(device_kind(d)))

    def refuses(self, place: Device) -> str:  # noqa: ARG002 - for subclasses
        """Return why a GPU that the provider lists cannot be used, or ""."""
        return ""

    def usual_kind(self, part: str = "") -> str:
        """Return "cpu", "gpu" or "npu": what `--device` most likely means, without looking."""
        return part if part in ("cpu", "gpu", "npu") else self.kind

    def place(self, part: str = "") -> Device:
        """Return where the frames of its models are."""
        if self.memory == "cpu":
            return CPU
        return Device("cuda", int(part) if part.isdecimal() else 0)

    def no_device(self) -> str:
        """Return why a registered plug-in may list no device."""
        return _no_drm()


@dataclass(frozen=True, slots=True)
class Found:
    """A provider that can be asked for, on one device.

    Attributes:
        provider: its description.
        ep: its name, spelled as ONNX Runtime spells it here.
        device: the `OrtEpDevice` of a plug-in; None for a provider that is built in.
        part: what followed the name in `--device`.
    """

    provider: Provider
    ep: str
    device: Any = None
    part: str = ""

    @property
    def kind(self) -> str:
        """Return "cpu", "gpu" or "npu"."""
        if self.device is not None:
            return device_kind(self.device)
        return self.provider.kind

    @property
    def label(self) -> str:
        """Return what `--device` takes for exactly this."""
        return f"{self.provider.name}:{self.part}" if self.part else self.provider.name

    def attach(self, options: Any, provider_options: dict[str, str]) -> dict[str, Any]:
        """Add the provider to `onnxruntime.SessionOptions`.

        Returns:
            What `InferenceSession` is given besides: plug-ins take no `providers`.
        """
        if self.device is None:
            return {"providers": [(self.ep, provider_options)]}
        options.add_provider_for_devices([self.device], provider_options)
        return {}


def device_kind(device: Any) -> str:
    """Return "cpu", "gpu" or "npu" for an `OrtEpDevice`."""
    return str(device.device.type).rpartition(".")[2].lower()


def find(provider: Provider, ort: Any, part: str = "", prefer: str = "speed") -> Found:
    """Return a provider ready to be asked for, registering its library if need be.

    Args:
        provider: its description.
        ort: the onnxruntime module.
        part: what follows the name in `--device`.
        prefer: see `PREFERENCES`.

    Raises:
        DeviceError: it is not there; the message says why, the hint what to do.
    """
    if not provider.here():
        raise DeviceError(
            f"{provider.title} does not exist for this operating system",
            hint="See vidpipe devices for what there is",
        )
    if provider.package is None:
        for name in ort.get_available_providers():
            if name.casefold() == provider.ep.casefold():
                found = Found(provider, name, None, part)
                break
        else:
            raise DeviceError(
                f"ONNX Runtime {ort.__version__} here has no {provider.ep}",
                hint=f"Install it with: {provider.install}",
            )
    else:
        if not provider.installed():
            raise DeviceError(
                f"'{provider.package}' is not installed",
                hint=f"Install it with: {provider.install}",
            )
        devices = _devices(provider, ort, part)
        device = provider.choose_device(devices, part, prefer)
        found = Found(provider, device.ep_name, device, part)
    if refusal := provider.refuses(provider.place(part)):
        raise DeviceError(refusal, hint="See vidpipe devices for what there is")
    return found


def all_devices(provider: Provider, ort: Any) -> list[Any]:
    """Return every device that a plug-in lists.

    Raises:
        DeviceError: it cannot be loaded, or lists none.
    """
    return _devices(provider, ort, "")


def _devices(provider: Provider, ort: Any, part: str) -> list[Any]:
    with _register_lock:
        name = provider.ep_name(part)
        devices = _listed(ort, name)
        if devices:
            return devices
        if not hasattr(ort, "register_execution_provider_library"):
            raise DeviceError(
                f"ONNX Runtime {ort.__version__} takes no plug-in providers",
                hint='Install a newer one: pip install "onnxruntime>=1.24"',
            )
        path = provider.library(part)
        try:
            ort.register_execution_provider_library(name, str(path))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if "already registered" not in str(error):
                raise DeviceError(
                    f"the library of {provider.title} cannot be loaded: {first_line(error)}",
                    hint="See vidpipe doctor",
                ) from None
        devices = _listed(ort, name)
    if not devices:
        why = provider.no_device()
        raise DeviceError(
            f"{provider.title} finds no device here" + (f": {why}" if why else ""),
            hint="See vidpipe devices for what there is",
        )
    return devices


def _listed(ort: Any, name: str) -> list[Any]:
    listing = getattr(ort, "get_ep_devices", None)
    if listing is None:
        return []
    return [d for d in listing() if d.ep_name.casefold() == name.casefold()]


def _no_drm(folder: Path = Path("/sys/class/drm")) -> str:
    if sys.platform == "linux" and not folder.is_dir():
        return f"ONNX Runtime finds GPUs through {folder}, which this system does not have"
    return ""
