"""Graph files, validation and overrides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pytest

from vidpipe.errors import GraphError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.graph import Graph, shipped_graphs
from vidpipe.stage import Sink, Source, Stage, register
from vidpipe.testing import Collect, patterns


@register("test-source")
class ASource(Source):
    def __init__(self, *, path: str, start_s: float = 0.0) -> None:
        self.path = path

    def plan(self) -> FrameSpec:
        raise AssertionError

    def frames(self) -> Iterable[Frame]:
        raise AssertionError


@register("test-stage")
class AStage(Stage):
    def __init__(
        self,
        *,
        amount: float | None = None,
        taps: int = 4,
        names: list[str] | None = None,
        options: dict[str, str] | None = None,
        fast: bool = False,
        mode: Literal["a", "b"] = "a",
    ) -> None: ...

    def plan(self, spec: FrameSpec) -> FrameSpec:
        raise AssertionError

    def process(self, frame: Frame) -> Iterable[Frame]:
        raise AssertionError


@register("test-sink")
class ASink(Sink):
    def plan(self, spec: FrameSpec) -> None:
        raise AssertionError

    def write(self, frame: Frame) -> None:
        raise AssertionError


GOOD = """\
# Sharper, and nothing else.
# A second line of prose.
[stage.source]
use = "test-source"
path = "in.mp4"

[stage.filter]
use = "test-stage"
from = "source"
amount = 1

[stage.sink]
use = "test-sink"
from = "filter"
"""


def wrong(text: str) -> str:
    with pytest.raises(GraphError) as caught:
        Graph.parse(text, "g.toml").validate()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("g.toml")
    return message


def test_a_good_graph() -> None:
    graph = Graph.parse(GOOD)
    graph.validate()
    assert graph.title == "Sharper, and nothing else."
    assert [n.name for n in graph.ordered()] == ["source", "filter", "sink"]
    assert graph.root("sink").name == "source"
    assert [n.name for n in graph.readers("source")] == ["filter"]


def test_stages_may_be_written_in_any_order() -> None:
    tables = ["[stage." + part for part in GOOD.split("[stage.")[1:]]
    graph = Graph.parse("".join(reversed(tables)))
    assert [n.name for n in graph.ordered()] == ["source", "filter", "sink"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('from = "source"', 'from = "sorce"', "stage 'filter': 'from' names 'sorce', which does "
         "not exist. Did you mean 'source'?"),
        ('use = "test-stage"', 'use = "tset-stage"', "Did you mean 'test-stage'?"),
        ('use = "test-stage"', "", "stage 'filter': 'use' is missing"),
        ('from = "source"', "", "stage 'filter': 'from' is missing"),
        ('from = "filter"', 'from = "source"', "stage 'filter': nobody reads from it"),
        ("amount = 1", "amuont = 1", "has no option 'amuont'. Did you mean 'amount'?"),
        ("amount = 1", 'amount = "much"', "'amount' is 'much', expected a number"),
        ("amount = 1", "taps = 1.5", "'taps' is 1.5, expected a whole number"),
        ("amount = 1", "taps = true", "'taps' is True, expected a whole number"),
        ("amount = 1", "names = [1]", "expected a list, each text"),
        ("amount = 1", 'mode = "c"', "expected one of 'a', 'b'"),
        ('path = "in.mp4"', "", "stage 'source': 'path' is missing. Set it with --set source.path"),
        ('from = "source"', 'from = "filter"', "feed each other in a circle: filter"),
        ("[stage.source]", "[stage.source", "not valid TOML"),
        ("[stage.source]", "[stages.source]", "unknown key 'stages'. Did you mean 'stage'?"),
        (GOOD, "", "no stages"),
        (GOOD, "stage = 3", "stages are tables"),
        ('use = "test-source"', 'use = "test-source"\nfrom = "filter"', "takes no 'from'"),
    ],
)  # fmt: skip
def test_wrong_graphs_are_named_in_one_line(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert expected in wrong(GOOD.replace(old, new))


def test_nothing_comes_out_of_a_sink() -> None:
    text = GOOD + '[stage.more]\nuse = "test-sink"\nfrom = "sink"\n'
    assert "'from' names 'sink', a sink" in wrong(text)


def test_overrides() -> None:
    graph = Graph.parse(GOOD)
    graph.override("filter.amount=0.5")
    graph.override("filter.taps = 8")
    graph.override('filter.names=["x", "y"]')
    graph.override("filter.options={a = 'b'}")
    graph.override("filter.fast=true")
    graph.override("source.path=C:\\clips\\in 2.mp4")
    assert graph.nodes["filter"].options == {
        "amount": 0.5,
        "taps": 8,
        "names": ["x", "y"],
        "options": {"a": "b"},
        "fast": True,
    }
    assert graph.nodes["source"].options["path"] == "C:\\clips\\in 2.mp4"
    graph.override("source.path=2024")
    assert graph.nodes["source"].options["path"] == "2024"


@pytest.mark.parametrize("text", ["filter", "filter=1", "filter.amount", ".x=1", "fliter.amount=1"])
def test_wrong_overrides(text: str) -> None:
    with pytest.raises(GraphError, match=r"stage\.key=value|Did you mean 'filter'"):
        Graph.parse(GOOD).override(text)


def test_a_graph_built_in_code_may_hold_ready_made_stages() -> None:
    graph = Graph().add("in", patterns(1)).add("out", Collect(), "in")
    graph.validate()
    with pytest.raises(GraphError, match="two stages are called 'in'"):
        graph.add("in", patterns(1))
    with pytest.raises(GraphError, match="takes no options"):
        Graph().add("out", Collect(), "in", path="x")


def test_missing_files_and_names(tmp_path) -> None:
    with pytest.raises(GraphError, match="cannot read graph"):
        Graph.load(tmp_path / "none.toml")
    with pytest.raises(GraphError, match="no graph is called 'upscale-3x'"):
        Graph.load("upscale-3x")


@pytest.mark.parametrize("name", shipped_graphs())
def test_shipped_graphs_are_sound_but_for_their_paths(name: str) -> None:
    graph = Graph.load(name)
    assert graph.title
    for node in graph.nodes.values():
        if node.use in ("decode", "encode"):
            graph.set(node.name, "path", "x.mp4")
    graph.validate()
