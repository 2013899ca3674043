"""Run the models of a graph on one grey frame, so that what they compile is in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from vidpipe.frame import Frame, FrameSpec, pixel_format
from vidpipe.graph import Graph, Node
from vidpipe.pipeline import Pipeline
from vidpipe.stage import FrameSource, Sink, Source


def warm_graph(
    graph: str,
    size: tuple[int, int],
    pix_fmt: str = "yuv420p",
    device: str | None = None,
    precision: str | None = None,
) -> Iterator[str]:
    """Put one frame through a graph, with its files left out; yield a line for each model.

    Args:
        graph: a path ending in .toml, or the name of a shipped graph.
        size: (width, height) of the source's pictures.
        pix_fmt: what the decoder gives.
        device: where the models run; as the graph says if not given.
        precision: what the models compute in; as the graph says if not given.

    Raises:
        GraphError: there is no such graph.
        SpecError: the format is not known, or a stage cannot take such frames.
        VidpipeError: whatever the stages raise.
    """
    spec = FrameSpec(
        width=size[0],
        height=size[1],
        format=pixel_format(pix_fmt),
        time_base=Fraction(1, 25),
        rate=Fraction(25),
    )
    grey = 1 << (spec.format.bits - 1 + spec.format.shift)
    planes = tuple(np.full(shape, grey, spec.format.dtype) for shape in spec.plane_shapes())
    given = Graph.load(graph)
    models = [node.name for node in given.using("model")]
    for name in models:
        given.set(name, "wait_compile", True)
        if precision is not None:
            given.set(name, "precision", precision)
        if device is not None:
            given.set(name, "device", device)
    pipeline = Pipeline(_without_files(given, Frame(planes, spec, 0)))
    report = pipeline.run()
    for name in models:
        yield f"{name}: {report.stage(name).facts['summary']}"


def _without_files(given: Graph, frame: Frame) -> Graph:
    """Return the graph with a frame for its sources and nothing behind its sinks."""
    graph = Graph(given.title, given.origin)
    for node in given.ordered():
        graph.nodes[node.name] = _replaced(node, frame)
    return graph


def _replaced(node: Node, frame: Frame) -> Node:
    if issubclass(node.cls, Source):
        return Node(node.name, "", None, {}, FrameSource(frame.spec, (frame,)))
    if issubclass(node.cls, Sink):
        return Node(node.name, "null", node.source)
    return node
