"""`vidpipe cache`: parsing and printing only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vidpipe.errors import InputError
from vidpipe.providers.runtime import forbid_downloads

out = Console()
err = Console(stderr=True)

cache = typer.Typer(help="What is kept between runs: compiled models and choices.")


@cache.command("list")
def list_entries(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List what is kept, and where."""
    from vidpipe.model.cache import Cache

    kept = Cache()
    entries = kept.entries()
    if as_json:
        _print_json({"folder": str(kept.folder), "entries": [e.to_dict() for e in entries]})
        return
    if entries:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("kind", "key", "KiB", "built from"):
            table.add_column(heading)
        for e in entries:
            facts = ", ".join(f"{k} {_short(v)}" for k, v in e.facts.items())
            table.add_row(e.kind, e.key[:12], f"{e.bytes / 1024:.0f}", facts)
        out.print(table, markup=False)
    total = sum(e.bytes for e in entries) / 2**20
    _print(f"{kept.folder}: {len(entries)} entries, {total:.1f} MiB")


@cache.command()
def clear(
    kind: Annotated[str | None, typer.Argument(help="Only entries of this kind.")] = None,
) -> None:
    """Delete what is kept."""
    from vidpipe.model.cache import Cache

    kept = Cache()
    count, size = kept.clear(kind)
    _print(f"{kept.folder}: {count} entries deleted, {size / 2**20:.1f} MiB")


@cache.command()
def warm(
    graph: Annotated[str, typer.Argument(help="Shipped graph or TOML file.")],
    size: Annotated[str, typer.Option(metavar="WxH", help="Size of the source's pictures.")],
    pix_fmt: Annotated[str, typer.Option(help="Pixel format that the decoder gives.")] = "yuv420p",
    device: Annotated[
        str | None, typer.Option(help="Where models run. [default: the graph's]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="What models compute in. [default: the graph's]")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
) -> None:
    """Build ahead what the models of a graph need for pictures of a size."""
    from vidpipe.model.cache import Cache
    from vidpipe.warm import warm_graph

    if offline:
        forbid_downloads()
    kept = Cache()
    before = {(e.kind, e.key) for e in kept.entries()}
    for line in warm_graph(graph, _size(size), pix_fmt, device, precision):
        _print(line)
    new = [e for e in kept.entries() if (e.kind, e.key) not in before]
    total = sum(e.bytes for e in new) / 2**20
    _print(f"{kept.folder}: {len(new)} new entries, {total:.1f} MiB")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise InputError(f"size is '{text}'", hint="Write it as WIDTHxHEIGHT, such as 1280x720")
    return int(width), int(height)


def _short(value: Any) -> str:
    text = Path(value).name if isinstance(value, str) and "/" in value else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _print(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201 - rich would wrap the line
