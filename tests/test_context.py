"""Compiled models in the cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.modelgen import random_net
from vidpipe.model import context
from vidpipe.model.cache import Cache
from vidpipe.model.compile import Compiled, compile_model
from vidpipe.model.context import context_facts, load
from vidpipe.model.descriptor import describe
from vidpipe.model.session import import_onnxruntime
from vidpipe.testing import pattern, spec

SPEC = spec(64, 48)


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    return compile_model(describe(random_net(tmp_path / "m.onnx")), SPEC, portable=True)


def facts_of(graph: bytes) -> dict[str, Any]:
    return context_facts(graph, provider="p 1", device="d", driver="3", options={"a": "1"})


def run(session: Any, compiled: Compiled) -> list[np.ndarray[Any, Any]]:
    planes = pattern(SPEC).planes
    feeds = {t.name: p.reshape(t.shape) for t, p in zip(compiled.inputs, planes, strict=True)}
    result: list[np.ndarray[Any, Any]] = session.run([t.name for t in compiled.outputs], feeds)
    return result


class Runtime:
    """The CPU provider, and a compiler that keeps the graph as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled = 0
        self.opened: list[str] = []
        self.refuse: set[str] = set()

        def compile_(folder: Path, graph: bytes, options: Any) -> None:
            self.compiled += 1
            (folder / "model.onnx").write_bytes(graph)

        monkeypatch.setattr(context, "_compile", compile_)

    def open(self, source: bytes | str) -> Any:
        kind = "graph" if isinstance(source, bytes) else "file"
        self.opened.append(kind)
        if kind in self.refuse:
            self.refuse.discard(kind)
            raise RuntimeError("driver changed")
        ort = import_onnxruntime()
        return ort.InferenceSession(source, providers=["CPUExecutionProvider"])


def test_compiled_once_then_loaded(
    tmp_path: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, graph = Runtime(monkeypatch), compiled.proto.SerializeToString()
    cache = Cache(tmp_path / "cache")
    first = load(cache, graph, facts_of(graph), runtime.open, lambda: None)
    second = load(cache, graph, facts_of(graph), runtime.open, lambda: None)
    assert (first.cached, second.cached, runtime.compiled) == (False, True, 1)
    assert (first.note, second.note) == ("", "")
    assert runtime.opened == ["file", "file"]
    for a, b in zip(run(first.session, compiled), run(second.session, compiled), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_the_provider_refuses_is_made_again(
    tmp_path: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, graph = Runtime(monkeypatch), compiled.proto.SerializeToString()
    cache = Cache(tmp_path / "cache")
    load(cache, graph, facts_of(graph), runtime.open, lambda: None)
    runtime.refuse = {"file"}
    again = load(cache, graph, facts_of(graph), runtime.open, lambda: None)
    assert runtime.compiled == 2
    assert again.note == "the cached model is not accepted, compiling again: driver changed"
    assert load(cache, graph, facts_of(graph), runtime.open, lambda: None).cached


def test_a_fresh_file_that_does_not_load_is_left_out(
    tmp_path: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, graph = Runtime(monkeypatch), compiled.proto.SerializeToString()
    runtime.refuse = {"file"}
    loaded = load(Cache(tmp_path / "cache"), graph, facts_of(graph), runtime.open, lambda: None)
    assert runtime.opened == ["file", "graph"]
    assert "does not load: driver changed" in loaded.note
    assert len(run(loaded.session, compiled)) == 3


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, graph = Runtime(monkeypatch), compiled.proto.SerializeToString()
    (tmp_path / "file").write_text("")
    loaded = load(Cache(tmp_path / "file"), graph, facts_of(graph), runtime.open, lambda: None)
    assert runtime.opened == ["graph"]
    assert "VIDPIPE_CACHE" in loaded.note


def test_the_cpu_provider_compiles_nothing(tmp_path: Path, compiled: Compiled) -> None:
    """What a provider without EP contexts does: it runs, and nothing is kept."""
    ort = import_onnxruntime()
    graph = compiled.proto.SerializeToString()

    def opened(source: bytes | str) -> Any:
        return ort.InferenceSession(source, providers=["CPUExecutionProvider"])

    def options() -> Any:
        made = ort.SessionOptions()
        made.log_severity_level = 4
        made.add_provider("XnnpackExecutionProvider", {})
        return made

    cache = Cache(tmp_path / "cache")
    loaded = load(cache, graph, facts_of(graph), opened, options)
    assert "not kept" in loaded.note
    assert cache.entries() == []


def test_openvino_loads_what_it_compiled(tmp_path: Path, compiled: Compiled) -> None:
    """With the real plug-in, where its wheel is installed and it has a device."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("onnxruntime-ep-openvino is not installed")
    import onnxruntime_ep_openvino as plugin

    ort = import_onnxruntime()
    name = "OpenVINOExecutionProvider"
    if not any(d.ep_name == name for d in ort.get_ep_devices()):
        ort.register_execution_provider_library("openvino", plugin.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == name]
    if not devices:
        pytest.skip("the plug-in has no device on this processor")

    def options() -> Any:
        made = ort.SessionOptions()
        made.add_provider_for_devices(devices[:1], {})
        return made

    def opened(source: bytes | str) -> Any:
        return ort.InferenceSession(source, options())

    graph = compiled.proto.SerializeToString()
    cache = Cache(tmp_path / "cache")
    first = load(cache, graph, facts_of(graph), opened, options)
    second = load(cache, graph, facts_of(graph), opened, options)
    assert (first.cached, second.cached, second.note) == (False, True, "")
    assert len(list(cache.entries()[0].folder.glob("*.bin"))) == 1
    for a, b in zip(run(second.session, compiled), run(opened(graph), compiled), strict=True):
        np.testing.assert_array_equal(a, b)
