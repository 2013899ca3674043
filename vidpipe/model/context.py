"""Models that a provider has compiled, kept as EP context files.

ONNX Runtime's `ModelCompiler` writes a graph whose parts are what a provider made of them; such a
file loads in a fraction of the time. It fits the provider, device and driver it was made
with, so all of these are part of its key in the cache. A file that passes the cache's check but
that the provider does not load any more is made again once, with a note.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidpipe.errors import ModelError, OutputError
from vidpipe.model.cache import Cache
from vidpipe.providers.base import Found, Request
from vidpipe.providers.runtime import first_line, import_onnxruntime

KIND = "context"
"""Kind of the cache's entries with a compiled model."""

RUNTIME_KIND = "runtime"
"""Kind of the entries that a provider fills with what it compiles."""

_FILE = "model.onnx"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A session and where it came from.

    Attributes:
        session: `onnxruntime.InferenceSession`.
        cached: whether the compiled model was there already.
        note: one line for the user, or "".
    """

    session: Any
    cached: bool
    note: str = ""


def context_facts(
    graph: bytes,
    *,
    provider: str,
    device: str,
    driver: str,
    options: Mapping[str, str],
    model: str = "",
) -> dict[str, Any]:
    """Return what a compiled model depends on.

    Args:
        graph: the compiled frame graph; it holds the model, shapes, colours and precision.
        provider: name and version of the execution provider.
        device: what it runs on.
        driver: version of the device's driver, or "".
        options: of the provider; paths in them should be left out.
        model: for people.
    """
    return {
        "model": model,
        "graph": hashlib.sha256(graph).hexdigest(),
        "provider": provider,
        "device": device,
        "driver": driver,
        "runtime": f"onnxruntime {import_onnxruntime().__version__}",
        "options": dict(options),
    }


def facts_for(found: Found, graph: bytes, request: Request, model: str = "") -> dict[str, Any]:
    """Return `context_facts` of a provider that was found."""
    provider, device = found.provider, found.device
    about: dict[str, str] = {}
    if device is not None:
        about = {**device.device.metadata, **device.ep_metadata}
    return context_facts(
        graph,
        provider=f"{found.ep} {about.get('version', '')}".strip(),
        device=f"{found.kind} {about.get('FULL_DEVICE_NAME') or _hardware(device)}".strip(),
        driver=about.get("driver_version", ""),
        options=provider.options(replace(request, cache=None)),
        model=model,
    )


def _hardware(device: Any) -> str:
    if device is None:
        from vidpipe.model.choose import processor_name

        return processor_name()
    hardware = device.device
    return f"{hardware.vendor} {hardware.vendor_id:04x}:{hardware.device_id:04x}"


def load(
    cache: Cache,
    graph: bytes,
    facts: Mapping[str, Any],
    open_session: Callable[[bytes | str], Any],
    session_options: Callable[[], Any],
) -> Loaded:
    """Return a session of a compiled model: from the cache, or compiled and then kept.

    Args:
        cache: where compiled models are kept. If it cannot be written the model is
            compiled as it is loaded.
        graph: the frame graph.
        facts: see `context_facts`.
        open_session: makes an `InferenceSession` of a graph, or of a file's path.
        session_options: makes `SessionOptions` with the provider set.

    Raises:
        Exception: whatever `open_session` raises for the graph itself.
    """
    notes = []
    for attempt in range(2):
        try:
            kept = cache.obtain(
                KIND, facts, lambda folder: _compile(folder, graph, session_options)
            )
        except ModelError as error:
            notes.append(f"the compiled model is not kept: {error.message}")
            break
        except OutputError as error:
            notes.append(str(error))
            break
        if kept.note:
            notes.append(kept.note)
        try:
            session = open_session(str(kept.folder / _FILE))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            cache.drop(KIND, facts)
            if attempt == 0 and not kept.built:
                notes.append(
                    f"the cached model is not accepted, compiling again: {first_line(error)}"
                )
                continue
            notes.append(f"the compiled model does not load: {first_line(error)}")
            break
        return Loaded(session, not kept.built, "; ".join(notes))
    return Loaded(open_session(graph), False, "; ".join(notes))


def _compile(folder: Path, graph: bytes, session_options: Callable[[], Any]) -> None:
    ort = import_onnxruntime()
    try:
        ort.ModelCompiler(
            session_options(), graph, embed_compiled_data_into_model=False
        ).compile_to_file(str(folder / _FILE))
    except Exception as error:  # see above
        raise ModelError(first_line(error)) from None
