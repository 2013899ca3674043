"""The enhance stage: tiers, controls, governor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import modelgen
import numpy as np
import pytest
from livekit import one, same

from vidpipe.errors import InputError, ModelError, SpecError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.live.enhance import DEFAULT_TIERS, Enhance, tier_precisions
from vidpipe.model.stage import Model
from vidpipe.testing import ManualClock, pattern, spec

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(modelgen.random_net(tmp_path_factory.mktemp("models") / "other.onnx", 2))


def open_stage(stage: Enhance, first: FrameSpec, clock: ManualClock | None = None) -> Enhance:
    stage.clock = clock or ManualClock()
    stage.plan(first)
    stage.open()
    return stage


def test_the_enhance_stage_gives_the_models_own_pictures(doubler: str) -> None:
    stage = open_stage(Enhance(tiers=[doubler], latency_budget_s=5), spec())
    frame = pattern(spec(), 3)
    frame.captured_s = 1.5
    out = one(stage, frame)
    model = Model(model=doubler)
    model.plan(spec())
    model.open()
    (wanted,) = model.process(frame)
    assert same(out.planes, wanted.planes)
    assert (out.pts, out.captured_s, out.before) == (frame.pts, 1.5, frame)
    model.close()
    stage.close()


def test_a_waiting_frame_is_stale_when_it_would_miss_the_budget(doubler: str) -> None:
    clock = ManualClock()
    stage = Enhance(tiers=[doubler], latency_budget_s=0.1)
    frame = pattern(spec(), 0)
    assert not stage.stale(frame)  # nothing is known yet
    open_stage(stage, spec(), clock)
    assert stage.governor is not None
    frame.captured_s = clock.now_s()
    stage.governor.costs_s[0] = 0.03
    clock.advance(0.04)
    assert not stage.stale(frame)
    stage.governor.downstream_s = 0.02
    assert stage.stale(frame)
    stage.close()


def test_controls_act_from_the_next_frame_on(doubler: str, other: str) -> None:
    stage = open_stage(Enhance(tiers=[other, doubler], latency_budget_s=5), spec())
    frame = pattern(spec(), 1)
    best = one(stage, frame).planes
    stage.controls.change({"tier": doubler})
    double = one(stage, frame).planes
    assert not same(best, double)
    stage.controls.change({"tier": "scale"})
    plain = one(stage, frame).planes
    stage.controls.change({"tier": other, "enabled": False})
    assert same(one(stage, frame).planes, plain)
    stage.controls.change({"enabled": True, "strength": 0.0})
    assert same(one(stage, frame).planes, plain)
    stage.controls.change({"strength": 1.0, "wipe": 0.5})
    wiped = one(stage, frame).planes
    assert np.array_equal(wiped[0][:, :63], plain[0][:, :63])
    assert np.array_equal(wiped[0][:, 65:], best[0][:, 65:])
    stage.controls.change({"wipe": None, "frozen": True})
    held = one(stage, frame)
    later = one(stage, pattern(spec(), 9))
    assert same(later.planes, held.planes)
    assert later.pts == 9
    stage.close()


def test_a_models_own_strength_is_set(tmp_path: Path) -> None:
    path = Path("vidpipe/models/clean-2x-nano.onnx")
    if not path.is_file():
        pytest.skip("the built-in models are not there")
    stage = open_stage(Enhance(tiers=[str(path)], latency_budget_s=5, strength=0.25), spec())
    one(stage, pattern(spec(), 1))
    assert stage.models[0].strength == 0.25
    stage.controls.change({"strength": 0.5})
    one(stage, pattern(spec(), 1))
    assert stage.models[0].strength == 0.5
    stage.close()


def test_tiers_must_agree_and_the_budget_must_make_sense(doubler: str, tmp_path: Path) -> None:
    triple = str(modelgen.nearest(tmp_path / "triple.onnx", 3))
    with pytest.raises(SpecError, match=r"tier '.*triple\.onnx' makes 192x144"):
        Enhance(tiers=[doubler, triple]).plan(spec())
    with pytest.raises(InputError, match="latency budget"):
        Enhance(tiers=[doubler], latency_budget_s=0)
    with pytest.raises(InputError, match="Known: auto"):
        Enhance(tiers=[doubler], tier="best")


def test_the_stage_steps_down_at_once_and_says_so(doubler: str, other: str) -> None:
    clock = ManualClock(10.0)
    stage = open_stage(Enhance(tiers=[other, doubler], latency_budget_s=0.05), spec(), clock)
    events: list[dict[str, Any]] = []
    stage.notify = events.append
    stage.name = "enhance"
    for number in range(3):
        in_time = pattern(spec(), number)
        in_time.captured_s = clock.now_s()
        one(stage, in_time)
    assert stage.tier == other
    for number in (3, 4):
        late = pattern(spec(), number)
        late.captured_s = clock.now_s() - 0.2
        one(stage, late)
    assert stage.tier == doubler
    on_time = pattern(spec(), 5)
    on_time.captured_s = clock.now_s()
    one(stage, on_time)
    assert [(e["event"], e["from"], e["to"]) for e in events] == [("tier", other, doubler)]
    assert "budget 50 ms" in events[0]["reason"]
    stage.controls.change({"tier": other})
    one(stage, pattern(spec(), 6))
    assert (events[-1]["to"], events[-1]["reason"]) == (other, "chosen")
    assert len(events) == 2
    stage.close()


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a copy beside it that says it is in int8, and gives another picture."""
    path = modelgen.nearest(tmp_path_factory.mktemp("models") / "copied.onnx", 2)
    claims = {
        "vidpipe.precision": "int8",
        "vidpipe.source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    modelgen.random_net(path.with_name("copied-int8.onnx"), 2, metadata=claims)
    return str(path)


def test_int8_holds_for_the_tiers_that_have_it(copied: str, other: str) -> None:
    stage = Enhance(tiers=[other, copied], latency_budget_s=5, precision="int8")
    stage.name = "enhance"
    events: list[dict[str, Any]] = []
    stage.notify = events.append
    open_stage(stage, spec())
    assert stage.report()["precisions"] == ["fp32", "int8"]
    assert events == [
        {
            "event": "precision",
            "filter": "enhance",
            "reason": f"not every tier has a copy in int8: {other} in fp32",
        }
    ]
    frame, plain = pattern(spec(), 1), Enhance(tiers=[other, copied], latency_budget_s=5)
    open_stage(plain, spec())
    found = {}
    for name in (other, copied, "scale"):
        for one_of in (stage, plain):
            one_of.controls.change({"tier": name})
        found[name] = same(one(stage, frame).planes, one(plain, frame).planes)
        assert stage.precision_now == {other: "fp32", copied: "int8"}.get(name)
    assert found == {other: True, copied: False, "scale": True}
    stage.replan(spec())
    assert [e["event"] for e in events].count("precision") == 1  # said once
    stage.close()
    plain.close()


def test_a_precision_that_no_tier_has_is_one_line(doubler: str) -> None:
    with pytest.raises(ModelError, match=r"no tier has a copy in int8: .*doubler\.onnx") as caught:
        Enhance(tiers=[doubler], precision="int8").plan(spec())
    assert "vidpipe models quantize" in str(caught.value.hint)
    with pytest.raises(ModelError, match="the CPU computes float16 models in float32"):
        Enhance(tiers=[doubler], precision="fp16").plan(spec())
    with pytest.raises(SpecError, match="precision 'int9' is not known"):
        Enhance(tiers=[], precision="int9")


def test_the_default_tiers_run_in_int8_where_they_can() -> None:
    if not Path("vidpipe/models/int8/clean-2x-nano.onnx").is_file():
        pytest.skip("the built-in models are not there")
    assert tier_precisions(DEFAULT_TIERS, "int8") == ["auto", "auto", "int8"]
    assert tier_precisions(DEFAULT_TIERS, "fp32") == ["fp32"] * 3


def test_tiers_are_compiled_before_the_first_frame(doubler: str) -> None:
    assert [model.wait_compile for model in Enhance(tiers=[doubler]).models] == [True]


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_the_tiers_run_on_a_plug_in_from_the_first_frame_on(precision: str) -> None:
    pytest.importorskip("onnxruntime_ep_openvino")
    path = Path("vidpipe/models/int8/nano-2x.onnx")
    if not path.is_file():
        pytest.skip("the built-in models are not there")
    stage = Enhance(tiers=["nano-2x"], latency_budget_s=5, device="openvino", precision=precision)
    open_stage(stage, spec())
    frame = pattern(spec(), 1)
    found = one(stage, frame).planes
    assert stage.provider() == "cpu (OpenVINOExecutionProvider)"
    assert stage.precision_now == ("fp32" if precision == "auto" else "int8")
    stage.close()
    cpu = Enhance(tiers=["nano-2x"], latency_budget_s=5, device="cpu", precision=precision)
    wanted = one(open_stage(cpu, spec()), frame).planes
    cpu.close()
    for a, b in zip(found, wanted, strict=True):
        # Providers round a chain of int8 layers differently.
        assert np.abs(a.astype(int) - b.astype(int)).mean() <= (0.1 if precision == "auto" else 1)


def test_the_first_run_of_a_tier_says_nothing_of_its_cost(
    doubler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, runs = ManualClock(), [0]
    process = Model.process

    def slow_at_first(model: Model, frame: Frame) -> Any:
        clock.advance(0.01 if runs[0] else 0.5)
        runs[0] += 1
        return process(model, frame)

    monkeypatch.setattr(Model, "process", slow_at_first)
    stage = open_stage(Enhance(tiers=[doubler], latency_budget_s=0.1), spec(), clock)
    assert stage.costs_s == [pytest.approx(0.01), 0]
    assert stage.governor is not None
    assert stage.governor.tier == 0
    stage.close()


def test_kept_pictures_stay_what_they_were(doubler: str) -> None:
    stage = open_stage(Enhance(tiers=[doubler], latency_budget_s=5), spec())
    kept = [one(stage, pattern(spec(), n)) for n in range(8)]
    copies = [[p.copy() for p in k.planes] for k in kept]
    for n in range(8, 20):
        one(stage, pattern(spec(), n))
    for frame, copy in zip(kept, copies, strict=True):
        assert same(frame.planes, tuple(copy))
    stage.close()
