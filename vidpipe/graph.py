"""Graphs: which stage feeds which, and with what options.

A graph is a TOML file of `[stage.NAME]` tables, or is built with `Graph.add`. Everything
about it is checked before any stage is made: names, links, options and their types.
Nothing here starts a thread or touches a device.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidpipe.errors import GraphError, did_you_mean
from vidpipe.stage import Actor, Sink, Source, options_of, stage_class

_FOLDERS = (Path(__file__).parent / "graphs", Path(__file__).parent.parent / "graphs")


@dataclass(slots=True)
class Node:
    """One stage of a graph.

    Attributes:
        name: unique in the graph.
        use: registered name of the stage class, or "" where `actor` is given.
        source: name of the stage that feeds it; None for a source.
        options: keyword arguments of the stage class.
        actor: a ready-made stage, or None.
    """

    name: str
    use: str = ""
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    actor: Actor | None = None

    @property
    def cls(self) -> type[Actor]:
        """The stage's class."""
        return type(self.actor) if self.actor is not None else stage_class(self.use)


class Graph:
    """A set of stages and the links between them.

    Args:
        title: one line that says what the graph does.
        origin: file name for messages.
    """

    def __init__(self, title: str = "", origin: str = "graph") -> None:
        self.title = title
        self.origin = origin
        self.nodes: dict[str, Node] = {}

    @classmethod
    def load(cls, name: str | Path) -> Graph:
        """Read a graph file, or a shipped graph by its name.

        Args:
            name: a path ending in .toml, or one of `shipped_graphs()`.

        Raises:
            GraphError: there is none, or it is wrong.
        """
        path = Path(name)
        if path.suffix != ".toml":
            shipped = shipped_graphs()
            if str(name) not in shipped:
                raise GraphError(
                    f"no graph is called '{name}'",
                    hint=f"{did_you_mean(str(name), [*shipped])} A file's name ends in .toml",
                )
            path = shipped[str(name)]
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise GraphError(f"cannot read graph '{path}': {reason}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, origin: str = "graph") -> Graph:
        """Read a graph from TOML text and check it.

        Raises:
            GraphError: with the file, the stage and the key that are wrong.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise GraphError(f"{origin}: not valid TOML: {error}") from None
        graph = cls(_title(text), origin)
        for key in document:
            if key != "stage":
                raise GraphError(
                    f"{origin}: unknown key '{key}'", hint=did_you_mean(key, ["stage"])
                )
        tables = document.get("stage", {})
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            raise GraphError(f"{origin}: stages are tables", hint="Write [stage.NAME]")
        for name, table in tables.items():
            options = dict(table)
            use = options.pop("use", None)
            source = options.pop("from", None)
            if not isinstance(use, str):
                raise GraphError(f"{origin}: stage '{name}': 'use' is missing")
            if source is not None and not isinstance(source, str):
                raise GraphError(f"{origin}: stage '{name}': 'from' is not the name of a stage")
            graph.nodes[name] = Node(name, use, source, options)
        graph._check_links()
        for node in graph.nodes.values():
            graph._check_options(node)
        return graph

    def add(self, name: str, use: str | Actor, source: str | None = None, **options: Any) -> Graph:
        """Add a stage and return the graph, so that calls can be chained.

        Args:
            name: unique in the graph.
            use: registered name, or a ready-made source, stage or sink.
            source: name of the stage that feeds it; None for a source.
            options: keyword arguments of the stage class.

        Raises:
            GraphError: the name is taken, or an option is wrong.
        """
        if name in self.nodes:
            raise GraphError(f"{self.origin}: two stages are called '{name}'")
        if isinstance(use, str):
            node = Node(name, use, source, options)
        else:
            node = Node(name, "", source, options, use)
        self._check_options(node)
        self.nodes[name] = node
        return self

    def override(self, assignment: str) -> None:
        """Apply one "stage.key=value"; the value is TOML, or else plain text.

        Raises:
            GraphError: the stage or the key does not exist, or the type is wrong.
        """
        target, equals, text = assignment.partition("=")
        name, dot, key = target.strip().partition(".")
        if not equals or not dot or not name or not key:
            raise GraphError(
                f"override '{assignment}' is not understood", hint="Write stage.key=value"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if name in self.nodes and isinstance(value, int | float) and not isinstance(value, bool):
            hint = self._options(self.nodes[name]).get(key, (Any, False))[0]
            if not _accepts(hint, value) and _accepts(hint, text):
                value = text
        self.set(name, key, value)

    def set(self, name: str, key: str, value: Any) -> None:
        """Set one option of a stage.

        Raises:
            GraphError: the stage or the key does not exist, or the type is wrong.
        """
        if name not in self.nodes:
            raise GraphError(
                f"{self.origin}: no stage is called '{name}'",
                hint=did_you_mean(name, [*self.nodes]),
            )
        node = self.nodes[name]
        node.options[key] = value
        self._check_options(node)

    def using(self, use: str) -> list[Node]:
        """Return the nodes whose class is registered as `use`."""
        return [node for node in self.nodes.values() if node.use == use]

    def readers(self, name: str) -> list[Node]:
        """Return the nodes that a stage feeds."""
        return [node for node in self.nodes.values() if node.source == name]

    def root(self, name: str) -> Node:
        """Return the source that feeds a stage, through whatever lies between."""
        node = self.nodes[name]
        while node.source is not None:
            node = self.nodes[node.source]
        return node

    def ordered(self) -> list[Node]:
        """Return the nodes so that each comes after the one that feeds it."""
        done: dict[str, Node] = {}
        while len(done) < len(self.nodes):
            ready = [
                n
                for n in self.nodes.values()
                if n.name not in done and (n.source is None or n.source in done)
            ]
            if not ready:
                loop = ", ".join(n for n in self.nodes if n not in done)
                raise GraphError(f"{self.origin}: stages feed each other in a circle: {loop}")
            done.update((n.name, n) for n in ready)
        return list(done.values())

    def validate(self) -> None:
        """Check the whole graph, required options included.

        Raises:
            GraphError: with the stage and the key that are wrong.
        """
        self._check_links()
        for node in self.nodes.values():
            self._check_options(node, complete=True)

    def _fail(self, node: Node, message: str, hint: str | None = None) -> GraphError:
        return GraphError(f"{self.origin}: stage '{node.name}': {message}", hint=hint)

    def _check_links(self) -> None:
        if not self.nodes:
            raise GraphError(f"{self.origin}: no stages", hint="Write [stage.NAME] tables")
        for node in self.nodes.values():
            if node.source is not None and node.source not in self.nodes:
                raise self._fail(
                    node,
                    f"'from' names '{node.source}', which does not exist",
                    did_you_mean(node.source, [n for n in self.nodes if n != node.name]),
                )
        for node in self.nodes.values():
            try:
                cls = node.cls
            except GraphError as error:
                raise self._fail(node, error.message, error.hint) from None
            if issubclass(cls, Source):
                if node.source is not None:
                    raise self._fail(node, f"'{node.use}' is a source and takes no 'from'")
            elif node.source is None:
                raise self._fail(node, "'from' is missing", "Name the stage that feeds it")
            if issubclass(cls, Sink) and (readers := self.readers(node.name)):
                raise self._fail(
                    readers[0], f"'from' names '{node.name}', a sink: nothing comes out of it"
                )
        self.ordered()
        for node in self.nodes.values():
            if not issubclass(node.cls, Sink) and not self.readers(node.name):
                raise self._fail(node, "nobody reads from it", "Add a sink, such as encode")

    def _options(self, node: Node) -> dict[str, tuple[Any, bool]]:
        return options_of(node.cls)

    def _check_options(self, node: Node, *, complete: bool = False) -> None:
        if node.actor is not None:
            if node.options:
                raise self._fail(node, "a ready-made stage takes no options")
            return
        try:
            known = self._options(node)
        except GraphError as error:
            raise self._fail(node, error.message, error.hint) from None
        for key, value in node.options.items():
            if key not in known:
                raise self._fail(
                    node, f"'{node.use}' has no option '{key}'", did_you_mean(key, [*known])
                )
            if not _accepts(known[key][0], value):
                raise self._fail(
                    node, f"'{key}' is {value!r}, expected {_type_name(known[key][0])}"
                )
        if complete:
            for key, (_, required) in known.items():
                if required and key not in node.options:
                    raise self._fail(
                        node, f"'{key}' is missing", f"Set it with --set {node.name}.{key}=..."
                    )


def shipped_graphs() -> dict[str, Path]:
    """Return the graphs that come with vidpipe: name -> file."""
    for folder in _FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def _title(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
        if line.strip():
            break
    return ""


def _accepts(hint: Any, value: Any) -> bool:
    """Say whether a TOML value fits a type hint of a stage option."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(part, value) for part in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, item = arguments
        return isinstance(value, dict) and all(
            _accepts(key, k) and _accepts(item, v) for k, v in value.items()
        )
    if isinstance(origin, type):
        return isinstance(value, list | tuple) and all(
            _accepts(arguments[0], item) for item in value
        )
    if hint is Path:
        return isinstance(value, str | Path)
    if hint is str:
        return isinstance(value, str | Path)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _type_name(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if typing.get_origin(hint) is list:
        return f"a list, each {_type_name(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return "a table"
    return names.get(hint, str(hint))
