"""`--device auto`: what is chosen, what is measured, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vidpipe import api
from vidpipe.device import CPU, Device
from vidpipe.errors import DeviceError, SpecError
from vidpipe.model import choose as module
from vidpipe.model.cache import Cache
from vidpipe.model.choose import Choice, choose, measure, pick
from vidpipe.model.descriptor import describe, find_model
from vidpipe.providers import Target, provider
from vidpipe.providers.base import Found, Provider

SAMPLE = Path(__file__).parent.parent / "samples" / "bigbuckbunny.mp4"


class Other(Provider):
    """A second provider that is the CPU provider by another name."""

    name = "other"
    ep = "CPUExecutionProvider"
    title = "Other"
    kind = "gpu"
    install = "pip install other"


class Ticks:
    """A clock that says what it is told."""

    def __init__(self, *steps_s: float) -> None:
        self.steps, self.now, self.count = list(steps_s) or [0.001], 0.0, 0

    def now_s(self) -> float:
        self.count += 1
        self.now += self.steps[(self.count // 2) % len(self.steps)]
        return self.now


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two providers in host memory."""
    both = [provider("cpu"), Other()]
    monkeypatch.setattr(module, "all_providers", lambda: both)
    monkeypatch.setattr(module.Target, "parse", classmethod(lambda cls, text: cls(_named(text))))


def _named(text: str) -> Provider:
    return Other() if text == "other" else provider(text)


@pytest.mark.parametrize(
    ("device", "kind", "place"),
    [("cpu", "cpu", CPU), ("cuda:1", "gpu", Device("cuda", 1)), ("rtx", "gpu", Device("cuda")),
     ("openvino", "cpu", CPU), ("openvino:gpu", "gpu", CPU), ("webgpu", "gpu", CPU)],
)  # fmt: skip
def test_what_is_named_is_taken(device: str, kind: str, place: Device, cache: Path) -> None:
    choice = choose(device, "nano-2x")
    assert (choice.device, choice.kind, choice.reason, choice.place) == (device, kind, "", place)
    assert not cache.exists()


def test_one_provider_needs_no_measurement(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(module, "all_providers", lambda: [provider("cpu")])
    for device in (None, "auto"):
        choice = choose(device, "nano-2x", lambda: pytest.fail("the size is not needed"))
        assert (choice.device, choice.kind) == ("cpu", "cpu")
        assert "auto: cpu" in choice.reason
    assert not cache.exists()


def test_the_faster_one_is_chosen_once_and_kept(two: None, cache: Path) -> None:
    sizes: list[int] = []

    def size() -> tuple[int, int]:
        sizes.append(1)
        return 64, 48

    # Runs take turns: three of the first to find the size, a first one of each, then in pairs.
    clock = Ticks(0.004, 0.004, 0.004, 0.004, 0.002, 0.004, 0.002, 0.004, 0.002, 0.004, 0.002)
    first = choose("auto", "nano-2x", size, clock=clock)
    assert first.device in ("cpu", "other")
    assert f"auto: {first.device}, " in first.reason
    assert " ms against " in first.reason
    asked = clock.count
    assert asked > 0
    # A second start measures nothing and loads no model.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_runner", lambda *_: pytest.fail("it was measured already"))
        again = choose("auto", "nano-2x", size, clock=clock)
    assert again == first
    assert clock.count == asked
    assert len(sizes) == 2
    assert [entry.kind for entry in Cache().entries()] == ["choice"]  # vidpipe cache list
    # Another size, preference or model is another question.
    choose("auto", "nano-2x", (96, 48), clock=clock)
    assert clock.count > asked


def test_a_damaged_entry_is_measured_again(two: None, cache: Path) -> None:
    first = choose("auto", "nano-2x", (64, 48), clock=Ticks())
    (entry,) = cache.rglob("value.json")
    entry.write_text("{")
    clock = Ticks()
    assert choose("auto", "nano-2x", (64, 48), clock=clock).kind in ("cpu", "gpu")
    assert clock.count > 0
    assert json.loads(next(cache.rglob("value.json")).read_text())["device"]
    assert first.device


def test_a_cache_that_cannot_be_written_is_no_error(
    two: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIDPIPE_CACHE", str(tmp_path / "file" / "cache"))
    assert choose("auto", "nano-2x", (64, 48), clock=Ticks()).reason


@pytest.mark.parametrize(
    ("times", "prefer", "expected"),
    [
        ({"cpu": 10.0, "a": 8.0}, "speed", "a"),
        ({"cpu": 10.0, "a": 9.6}, "speed", "cpu"),  # within the margin: the CPU starts at once
        ({"cpu": 10.0, "a": 11.0}, "speed", "cpu"),
        ({"cpu": 10.0, "a": 8.0, "npu": 7.0}, "latency", "npu"),
        ({"cpu": 10.0, "a": 8.0, "npu": 15.0}, "efficiency", "npu"),
        ({"cpu": 10.0, "a": 8.0, "npu": 25.0}, "efficiency", "a"),
        ({"cpu": 2.0, "a": 8.0, "npu": 25.0}, "efficiency", "cpu"),
        ({"a": 8.0}, "speed", "a"),
    ],
)
def test_the_pick(times: dict[str, float], prefer: str, expected: str) -> None:
    assert pick(times, {"cpu": "cpu", "a": "gpu", "npu": "npu"}, prefer) == expected


def test_a_measurement_takes_turns_and_names_what_fails() -> None:
    model = describe(find_model("nano-2x"))
    broken = Found(Other(), "NoSuchExecutionProvider")
    trial = measure(
        model, (64, 48), {"cpu": Target.parse("cpu").find(), "bad": broken}, clock=Ticks(0.003)
    )
    assert trial.times_ms == {"cpu": 3.0}
    assert trial.failed.keys() == {"bad"}
    assert trial.size == (64, 48)
    with pytest.raises(DeviceError, match="NoSuch"):
        measure(model, (64, 48), {"bad": broken}, clock=Ticks())


def test_a_large_picture_is_measured_on_less_of_it() -> None:
    model = describe(find_model("nano-2x"))
    trial = measure(model, (320, 192), {"cpu": Target.parse("cpu").find()}, clock=Ticks(1.0))
    assert trial.size == (160, 96)


@pytest.mark.parametrize(
    ("speeds", "least_runs"),
    [
        # Seconds a pixel: quick, slow, one far slower, many.
        ({"cpu": 1e-9, "a": 2e-9}, 4),
        ({"cpu": 1e-6, "a": 1e-6, "b": 2e-6}, 4),
        ({"cpu": 1e-7, "a": 2e-6}, 1),
        ({"cpu": 1e-7, **dict.fromkeys("abcdef", 1e-7)}, 2),
    ],
)
@pytest.mark.parametrize("size", [(640, 360), (3840, 2160)])
def test_a_measurement_stays_within_about_a_second(
    speeds: dict[str, float],
    least_runs: int,
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[tuple[str, float]] = []

    def runner(model: Any, at: tuple[int, int], found: Found, *_: Any) -> Any:
        def run() -> float:
            ran.append((found.ep, speeds[found.ep] * at[0] * at[1]))
            return ran[-1][1]

        return run

    monkeypatch.setattr(module, "_runner", runner)
    found = {name: Found(Other(), name) for name in speeds}
    trial = measure(describe(find_model("nano-2x")), size, found, clock=Ticks())
    assert sum(spent for _, spent in ran) < 1.3
    assert all([name for name, _ in ran].count(name) >= least_runs for name in speeds)
    assert min(trial.times_ms, key=lambda name: trial.times_ms[name]) == "cpu"


class FakeGpus:
    """CuPy on a machine with GPUs of so much free memory."""

    class CUDARuntimeError(Exception):
        pass

    def __init__(self, *free: int) -> None:
        self.free, self.at = free, 0
        outer = self

        class Context:
            def __init__(self, index: int) -> None:
                self.index = index

            def __enter__(self) -> None:
                outer.at = self.index

            def __exit__(self, *_: object) -> None:
                pass

        self.cuda = SimpleNamespace(Device=Context, runtime=self)

    def getDeviceCount(self) -> int:  # noqa: N802
        if not self.free:
            raise self.CUDARuntimeError("cudaErrorInsufficientDriver: driver is too old")
        return len(self.free)

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.free[self.at], 80 << 30

    def getDeviceProperties(self, index: int) -> dict[str, bytes]:  # noqa: N802
        return {"name": b"NVIDIA Test"}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*free: int) -> None:
        fake = FakeGpus(*free)
        monkeypatch.setattr(module, "import_cupy", lambda: fake)
        cuda = provider("cuda")
        monkeypatch.setattr(cuda, "installed", lambda: True)
        monkeypatch.setattr(module, "all_providers", lambda: [provider("cpu"), cuda])
        monkeypatch.setattr(module, "find", lambda p, ort, *rest: Found(p, p.ep))

    return make


def test_a_gpu_with_memory_is_taken(gpus: Any) -> None:
    gpus(8 << 30)
    choice = choose("auto", "nano-2x")
    assert (choice.device, choice.kind, choice.place) == ("cuda", "gpu", Device("cuda"))
    assert choice.reason == "auto: cuda, NVIDIA Test with 8.0 GiB free"


def test_of_several_gpus_the_one_with_most_memory_is_taken(gpus: Any) -> None:
    gpus(8 << 30, 20 << 30, 20 << 30)
    assert choose("auto", "nano-2x").device == "cuda:1"


@pytest.mark.parametrize(
    ("free", "why"), [((100 << 20,), "100 MiB free"), ((), "driver is too old")]
)
def test_a_gpu_that_cannot_be_used_is_passed_over_aloud(
    gpus: Any, free: tuple[int, ...], why: str
) -> None:
    gpus(*free)
    choice = choose("auto", "nano-2x")
    assert choice.device == "cpu"
    assert "cuda not used: " in choice.reason
    assert why in choice.reason


def test_cuda_is_passed_over_for_int8(gpus: Any) -> None:
    gpus(8 << 30)
    choice = choose("auto", "nano-2x", precision="int8")
    assert choice.device == "cpu"
    assert "cuda not used: CUDA runs no convolutions in int8" in choice.reason


def test_unknown_preferences_are_refused() -> None:
    with pytest.raises(SpecError, match="speed, latency, efficiency"):
        choose("auto", "nano-2x", prefer="best")


# -- the choice in a graph -------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(choice: Choice) -> list[str | None]:
        asked: list[str | None] = []

        def fake(device: str | None, model: str, size: Any = None, **_: Any) -> Choice:
            asked.append(device)
            if device not in (None, "auto"):
                return Choice(str(device), Target.parse(str(device)).kind)
            return choice

        monkeypatch.setattr(module, "choose", fake)
        return asked

    return make


def options(graph: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = graph.nodes[name].options
    return found


def test_decoder_and_models_agree_on_the_gpu(chosen: Any) -> None:
    asked = chosen(Choice("cuda:1", "gpu", "auto: because"))
    graph = api.build_graph(SAMPLE, "o.mp4", scale=4)
    assert asked == [None]
    assert options(graph, "source")["device"] == "cuda:1"
    for name in ("model", "model2"):
        assert options(graph, name)["device"] == "cuda:1"
        assert options(graph, name)["chosen"] == "auto: because"
    assert options(graph, "model")["model"] == "clean-2x-fast"


def test_a_provider_in_host_memory_leaves_the_decoder_alone(chosen: Any) -> None:
    chosen(Choice("openvino", "cpu", "auto: because"))
    graph = api.build_graph(SAMPLE, "o.mp4")
    assert "device" not in options(graph, "source")
    assert options(graph, "model")["device"] == "openvino"
    assert options(graph, "model")["model"] == "clean-2x-nano"


@pytest.mark.parametrize(
    ("device", "place", "model"),
    [("rtx", "cuda:0", "clean-2x-fast"), ("webgpu", None, "clean-2x-fast"),
     ("openvino", None, "clean-2x-nano"), ("cpu", None, "clean-2x-nano")],
)  # fmt: skip
def test_a_named_provider_is_mapped_to_a_place(device: str, place: str | None, model: str) -> None:
    graph = api.build_graph(SAMPLE, "o.mp4", device=device)
    assert options(graph, "source").get("device") == place
    assert options(graph, "model")["device"] == device
    assert "chosen" not in options(graph, "model")
    assert options(graph, "model")["model"] == model


def test_a_graph_and_an_override_have_their_own_say(chosen: Any, tmp_path: Path) -> None:
    chosen(Choice("cuda", "gpu", "auto: because"))
    path = tmp_path / "g.toml"
    path.write_text(
        '# Two.\n[stage.source]\nuse = "decode"\n'
        '[stage.a]\nuse = "model"\nfrom = "source"\nmodel = "nano-2x"\ndevice = "cpu"\n'
        '[stage.b]\nuse = "model"\nfrom = "a"\nmodel = "nano-2x"\n'
        '[stage.sink]\nuse = "encode"\nfrom = "b"\n'
    )
    graph = api.build_graph(SAMPLE, "o.mp4", graph=path)
    assert options(graph, "a")["device"] == "cpu"
    assert options(graph, "b")["device"] == "cuda"
    graph = api.build_graph(SAMPLE, "o.mp4", graph=path, overrides=["b.device=cpu"])
    assert options(graph, "b") == {"model": "nano-2x", "device": "cpu"}
    assert "device" not in options(graph, "source")
    graph = api.build_graph(SAMPLE, "o.mp4", graph=path, device="rtx", overrides=["a.device=cpu"])
    assert options(graph, "a")["device"] == "cpu"
    assert options(graph, "b")["device"] == "rtx"


def test_the_report_says_what_was_chosen_and_why(tmp_path: Path, two: None) -> None:
    report = api.enhance(SAMPLE, tmp_path / "o.mkv", duration_s=0.1, model="nano-2x")
    (facts,) = [s.facts for s in report.stages if s.name == "model"]
    assert facts["provider"] in ("cpu", "other")
    assert facts["chosen"].startswith(f"auto: {facts['provider']}, ")
    assert facts["chosen"] in facts["summary"]
