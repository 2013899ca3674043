"""Starting at once: a command loads what it needs, and the CPU runs frames while a slower
provider compiles, through the stage."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelgen
import numpy as np
import pytest

from vidpipe import providers
from vidpipe.errors import DeviceError, VidpipeError
from vidpipe.frame import FrameSpec
from vidpipe.model import session as sessions
from vidpipe.model.cache import Cache
from vidpipe.model.compile import compile_model
from vidpipe.model.context import KIND, RUNTIME_KIND
from vidpipe.model.descriptor import describe
from vidpipe.model.session import CPU_PROVIDER, HostSession, must_compile
from vidpipe.model.stage import Model
from vidpipe.providers import CPU_TARGET, Target
from vidpipe.providers.base import Found, Provider, Request
from vidpipe.providers.runtime import OFFLINE
from vidpipe.testing import pattern, spec

SPEC = spec(96, 64)
SAMPLE = Path(__file__).parent.parent / "samples" / "bigbuckbunny.mp4"


class Slow(Provider):
    """The CPU provider by another name, as if it had a compiler."""

    name = "slow"
    ep = CPU_PROVIDER
    title = "Slow"
    kind = "cpu"
    install = "pip install slow"
    context = True


class Compiler:
    """Holds the slow provider's sessions back until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.threads: list[str] = []
        self.problem: VidpipeError | None = None
        real = sessions.open_session

        def open_session(model: Any, compiled: Any, target: Target, **options: Any) -> Any:
            if target.provider.name == "slow":
                self.threads.append(threading.current_thread().name)
                assert self.open.wait(60)
                if self.problem is not None:
                    raise self.problem
            return real(model, compiled, target, **options)

        def load(self_: HostSession, cache: Cache, allow_cpu_nodes: bool) -> Any:
            facts = self_._facts(allow_cpu_nodes)
            cache.obtain(KIND, facts, lambda folder: None)
            return self_._load(self_._graph, allow_cpu_nodes)

        monkeypatch.setattr("vidpipe.model.stage.open_session", open_session)
        monkeypatch.setattr(HostSession, "_load_kept", load)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("VIDPIPE_CACHE", str(tmp_path / "cache"))
    return Cache()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    entry = SimpleNamespace(name="slow", load=Slow)
    monkeypatch.setattr(providers, "entry_points", lambda group: [entry])
    made = Compiler(monkeypatch)
    yield made
    made.open.set()
    for thread in threading.enumerate():  # what was begun is finished, here in this test's cache
        if thread.name == "compile slow":
            thread.join()


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return modelgen.random_net(tmp_path / "net.onnx", width=8, depth=2)


def opened(net: Path, device: str, given: FrameSpec = SPEC, **options: Any) -> Model:
    stage = Model(model=str(net), device=device, threads=1, **options)
    stage.plan(given)
    stage.open()
    return stage


def planes(stage: Model, number: int) -> list[np.ndarray[Any, Any]]:
    (result,) = stage.process(pattern(SPEC, number))
    return [plane.copy() for plane in result.planes]


def worst(first: list[np.ndarray[Any, Any]], second: list[np.ndarray[Any, Any]]) -> int:
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tile", ["off", "64x64"])
def test_frames_flow_while_it_compiles_and_the_next_run_waits_for_nothing(
    net: Path, compiler: Compiler, cache: Cache, tile: str
) -> None:
    options: dict[str, Any] = {"tile": tile}
    if tile != "off":
        net = modelgen.random_net(net, width=8, depth=2, metadata={"vidpipe.overlap": "4"})
    stage = opened(net, "slow", **options)
    alone = opened(net, "cpu", **options)
    for number in range(6):
        if number == 3:
            assert stage.status == "compiling for slow"
            assert stage.report()["provider"] == "cpu"
            assert "swapped" not in stage.report()["summary"]
            compiler.open.set()
            assert stage._swap is not None
            stage._swap.wait()
        assert worst(planes(stage, number), planes(alone, number)) <= 1
    assert stage.status == ""
    stage.close()
    alone.close()
    report = stage.report()
    assert (report["provider"], report["precision"]) == ("slow", "fp32")
    assert report["swap"]["state"] == "swapped"
    assert "compiled beside the run; swapped at frame 3" in report["summary"]
    assert compiler.threads == ["compile slow"]

    assert [e.kind for e in cache.entries()] == [KIND]
    again = opened(net, "slow", **options)
    planes(again, 0)
    again.close()
    assert again.report()["swap"] is None
    assert again.report()["provider"] == "slow"
    assert compiler.threads[1:] == [threading.current_thread().name]


HEAVY = {"onnxruntime", "onnx", "av", "cupy", "ray", "psutil", "rich.progress"}
OTHERS = {"vidpipe.live", "vidpipe.bench", "vidpipe.commands", "vidpipe.compare", "vidpipe.doctor"}
MODELS = {"vidpipe.model", "vidpipe.media", "vidpipe.segments"}
RUN = ["run", str(SAMPLE), "OUT.mkv", "--model", "nano-2x", "--duration", "0.02", "--json"]


@pytest.mark.parametrize(
    ("line", "unwanted"),
    [
        (["--version"], HEAVY | OTHERS | MODELS),
        (["--help"], (HEAVY | MODELS | OTHERS) - {"vidpipe.live", "vidpipe.commands"}),
        (["run", "--help"], HEAVY | OTHERS | MODELS),
        (RUN, {"cupy", "ray", "rich.progress"} | OTHERS),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_loads_what_it_needs(line: list[str], unwanted: set[str], tmp_path: Path) -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        "from vidpipe.cli import main; main()"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *(word.replace("OUT", str(tmp_path / "out")) for word in line),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "vidpipe.cli" in loaded
    assert unwanted & loaded == set()


def test_every_command_is_listed_and_found() -> None:
    from typer.testing import CliRunner

    from vidpipe.cli import app

    shown = [line.strip(" │|") for line in CliRunner().invoke(app, ["--help"]).stdout.splitlines()]
    for name in ("run", "graphs", "compare", "probe", "live", "bench", "models", "devices",
                 "doctor", "cache"):  # fmt: skip
        assert any(line.startswith(f"{name} ") for line in shown), name
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
    wrong = CliRunner().invoke(app, ["benhc"])
    assert wrong.exit_code == 2
    assert "bench" in wrong.output


def test_those_who_prefer_wait(net: Path, compiler: Compiler) -> None:
    compiler.open.set()
    stage = opened(net, "slow", wait_compile=True)
    planes(stage, 0)
    stage.close()
    assert (stage.report()["swap"], stage.report()["provider"]) == (None, "slow")
    assert compiler.threads == [threading.current_thread().name]


def test_a_run_that_ends_first_says_what_ran(net: Path, compiler: Compiler) -> None:
    stage = opened(net, "slow")
    planes(stage, 0)
    stage.close()
    report = stage.report()
    assert (report["provider"], report["swap"]["state"]) == ("cpu", "compiling")
    assert "slow did not take over before the end" in report["summary"]


def test_a_named_device_that_fails_is_an_error(net: Path, compiler: Compiler) -> None:
    compiler.problem = DeviceError("slow does not take LpPool", hint="Use --allow-cpu-nodes")
    stage = opened(net, "slow")
    compiler.open.set()
    assert stage._swap is not None
    stage._swap.wait()
    with pytest.raises(DeviceError, match=r"does not take LpPool.*--allow-cpu-nodes"):
        planes(stage, 0)
    stage.close()


def test_a_chosen_device_that_fails_is_a_note(net: Path, compiler: Compiler) -> None:
    compiler.problem = DeviceError("slow does not take LpPool")
    stage = opened(net, "slow", chosen="auto: slow")
    compiler.open.set()
    assert stage._swap is not None
    stage._swap.wait()
    planes(stage, 0)
    stage.close()
    report = stage.report()
    assert report["provider"] == "cpu"
    assert report["notes"] == ["the CPU ran the model: slow not used: slow does not take LpPool"]


def test_a_provider_with_a_cache_of_its_own_gets_a_folder(net: Path, cache: Cache) -> None:
    seen: list[Request] = []

    class Own(Slow):
        context = False
        cache_option = "cache_dir"

        def options(self, request: Request) -> dict[str, str]:
            seen.append(request)
            return {}

    found = Found(Own(), CPU_PROVIDER)
    model = describe(net)
    compiled = compile_model(model, SPEC)
    assert must_compile(model, compiled, found, threads=1)
    HostSession(compiled, found, threads=1, cache=cache, name=model.name).close()
    (entry,) = cache.entries()
    assert (entry.kind, entry.folder) == (RUNTIME_KIND, seen[-1].cache)
    assert not must_compile(model, compiled, found, threads=1)
    assert not must_compile(model, compiled, CPU_TARGET.find())
    HostSession(compiled, found, threads=1).close()
    assert seen[-1].cache is None


# -- OpenVINO ------------------------------------------------------------------------------


def needs_openvino() -> None:
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("onnxruntime-ep-openvino is not installed")
    try:
        Target.parse("openvino").find()
    except DeviceError as error:
        pytest.skip(str(error))


def test_openvino_takes_over_from_the_cpu(net: Path, cache: Cache) -> None:
    needs_openvino()
    stage = opened(net, "openvino")
    alone = opened(net, "cpu")
    ran = []
    for number in range(6):
        if number == 3:
            assert stage._swap is not None
            stage._swap.wait()
        assert worst(planes(stage, number), planes(alone, number)) <= 1
        ran.append(stage.report()["provider"])
    assert ran[0] == "cpu" or stage._swap is not None
    assert ran[3:] == ["openvino"] * 3
    stage.close()
    alone.close()
    assert list(stage.report()["nodes"]) == ["OpenVINOExecutionProvider"]
    (entry,) = cache.entries()
    assert (entry.kind, entry.facts["model"]) == (KIND, "net")
    assert "OpenVINOExecutionProvider" in entry.facts["provider"]
    again = opened(net, "openvino")
    assert again.report()["swap"] is None
    assert worst(planes(again, 1), planes(again, 1)) == 0
    again.close()


def test_openvino_is_warmed_ahead(
    cache: Cache, tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_openvino()
    monkeypatch.setenv(OFFLINE, "")  # the command sets it
    from typer.testing import CliRunner

    from vidpipe.cli import app

    graph = tmp_path / "g.toml"
    graph.write_text(
        '[stage.source]\nuse = "decode"\n'
        f'[stage.model]\nuse = "model"\nfrom = "source"\nmodel = {str(net)!r}\n'
        '[stage.sink]\nuse = "encode"\nfrom = "model"\n'
    )
    line = ["cache", "warm", str(graph), "--size", "96x64", "--device", "openvino", "--offline"]
    first = CliRunner().invoke(app, line)
    assert first.exit_code == 0, first.output
    assert "1 new entries" in first.stdout
    assert "0 new entries" in CliRunner().invoke(app, line).stdout
