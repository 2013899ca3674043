"""How many decoders a file is worth: the decision, and the rates that it is made by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mediagen import make

from vidpipe import decoders
from vidpipe.clock import MonotonicClock
from vidpipe.errors import VidpipeError
from vidpipe.graph import Graph
from vidpipe.pipeline import Pipeline


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make(tmp_path / "in.mp4", frames=100)


def to_null(source: Path) -> Graph:
    built = Graph("null").add("source", "decode", path=str(source))
    built.add("resize", "resize", "source", scale=0.5)
    return built.add("sink", "null", "resize")


class Rates:
    """In the place of a `decoders.Sample`: rates that are known."""

    here = True

    def __init__(self, engines: int, decode: float, models: float | None) -> None:
        self.engines, self.one, self.rest = engines, decode, models
        self.asked: list[int] = []
        self.closed = False

    def __call__(self, *_: Any) -> Rates:
        return self

    def on_gpu(self, _head: Any) -> bool:
        return self.here

    def decode(self, count: int) -> float:
        self.asked.append(count)
        return self.one * min(count, self.engines)

    def models(self) -> float | None:
        return self.rest

    def close(self) -> None:
        self.closed = True


def chosen(monkeypatch: pytest.MonkeyPatch, rates: Rates, frames: int | None = None) -> Any:
    monkeypatch.setattr(decoders, "Sample", rates)
    head = SimpleNamespace(expected_frames=frames)
    return decoders.choose(Graph(), "source", "sink", head, MonotonicClock())


@pytest.mark.parametrize(
    ("engines", "decode", "models", "count", "note"),
    [
        (7, 510.0, 730.0, 2, "decode 510 fps, models 730 fps: 2 decoders on each GPU"),
        (7, 500.0, 985.0, 3, "decode 500 fps, models 985 fps: 3 decoders on each GPU"),
        (7, 510.0, 1100.0, 3, "decode 510 fps, models 1100 fps: 3 decoders on each GPU"),
        (7, 100.0, 9000.0, 4, "decode 100 fps, models 9000 fps: 4 decoders on each GPU"),
        (7, 510.0, 164.0, 1, "decode 510 fps, models 164 fps: 1 decoder on each GPU"),
        (2, 100.0, 900.0, 2, "decode 100 fps, models 900 fps: 2 decoders on each GPU"),
        (7, 510.0, None, 4, "decode 510 fps, no models: 4 decoders on each GPU"),
        (
            1, 510.0, 730.0, 1,
            "decode 510 fps, models 730 fps: 1 decoder on each GPU, for several are no faster",
        ),
    ],
)  # fmt: skip
def test_decoders_by_the_rates_of_decoder_and_models(
    monkeypatch: pytest.MonkeyPatch,
    engines: int,
    decode: float,
    models: float | None,
    count: int,
    note: str,
) -> None:
    rates = Rates(engines, decode, models)
    assert chosen(monkeypatch, rates) == (count, note)
    assert rates.closed


def test_one_decoder_where_several_cannot_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(7, 510.0, 730.0)
    assert chosen(monkeypatch, rates, decoders.WORTH_FRAMES - 1) == (1, "")
    assert chosen(monkeypatch, rates, decoders.WORTH_FRAMES)[0] == 2
    asked = list(rates.asked)
    rates.here = False  # decoded or encoded by the CPU
    assert chosen(monkeypatch, rates) == (1, "")
    assert rates.asked == asked
    assert chosen(monkeypatch, Rates(7, 0.0, 730.0)) == (1, "")
    assert chosen(monkeypatch, Rates(7, 510.0, 0.0)) == (1, "")


@pytest.mark.usefixtures("no_leaks")
def test_rates_are_those_of_the_real_stages(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_MEASURED_S", 0.01)
    clock = MonotonicClock()
    sample = decoders.Sample(to_null(clip), "source", "sink", clock)
    assert not sample.on_gpu(None)
    one = sample.decode(1)
    assert one > 0
    assert [f.spec.width for f in sample._kept] == [160] * 4
    assert sample.decode(2) > 0
    rate = sample.models()
    assert rate is not None
    assert rate > 0
    sample.close()
    assert sample._kept == []
    bare = Graph().add("source", "decode", path=str(clip)).add("sink", "null", "source")
    assert decoders.Sample(bare, "source", "sink", clock).models() is None
    few = make(tmp_path / "few.mp4", frames=10)
    assert decoders.Sample(to_null(few), "source", "sink", clock).decode(1) == 0
    with pytest.raises(VidpipeError, match="does not exist"):
        decoders.Sample(to_null(tmp_path / "no.mp4"), "source", "sink", clock).decode(1)


@pytest.mark.usefixtures("no_leaks")
def test_an_interrupted_measurement_leaves_nothing_running(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(self: Pipeline, timeout_s: float | None = None) -> bool:
        if timeout_s is not None:
            raise KeyboardInterrupt
        return real(self)

    real = Pipeline.wait
    monkeypatch.setattr(Pipeline, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        decoders.Sample(to_null(clip), "source", "sink", MonotonicClock()).decode(2)
