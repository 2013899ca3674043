"""`vidpipe live`: parsing and printing only."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from vidpipe.errors import InputError, VidpipeError
from vidpipe.graph import Graph, Node
from vidpipe.interrupts import interrupts

if TYPE_CHECKING:
    from vidpipe.live.session import Live

_OUT, _PICTURE, _RUN = "Where it goes", "The picture", "The run"


def live(
    source: Annotated[
        str | None,
        typer.Argument(
            help="camera, camera:1, screen, screen:WxH+X,Y, rtsp://..., another URL, or a file.",
            show_default=False,
        ),
    ] = None,
    virtual_camera: Annotated[
        bool,
        typer.Option("--virtual-camera", help="Be a camera to others.", rich_help_panel=_OUT),
    ] = False,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Send to rtmp://, rtsp://, udp://, rtp://...", rich_help_panel=_OUT
        ),
    ] = None,
    record: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Record to .mp4 or .mkv.", rich_help_panel=_OUT),
    ] = None,
    page: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT", help="Serve the page and the API.", rich_help_panel=_OUT
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Token for the API. [default: made up where others can reach it]",
            envvar="VIDPIPE_TOKEN",
            show_default=False,
            rich_help_panel=_OUT,
        ),
    ] = None,
    snapshots: Annotated[
        Path, typer.Option(help="Folder for snapshots.", rich_help_panel=_OUT)
    ] = Path(),
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="Models, best first. [default: clean-2x-quality, -fast, -nano]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="0 to 1.", rich_help_panel=_PICTURE)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT of the camera or screen.", rich_help_panel=_PICTURE),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Frames a second of the camera or screen.", rich_help_panel=_PICTURE),
    ] = None,
    latency_budget: Annotated[
        str | None,
        typer.Option(
            help="From capture to output, such as 50ms. [default: 100ms]", rich_help_panel=_RUN
        ),
    ] = None,
    audio: Annotated[
        bool | None,
        typer.Option(
            "--audio/--no-audio",
            help="Pass the sound on. [default: audio]",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="What models run on: auto, cpu, cuda[:N], rtx, openvino, webgpu, directml, "
            "winml:NAME. [default: auto]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="What models compute in: auto, fp32, fp16, int8 (tiers that have such a copy). "
            "[default: auto]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each model.", rich_help_panel=_RUN)
    ] = None,
    graph: Annotated[
        str | None, typer.Option(help="Shipped graph or TOML file.", rich_help_panel=_RUN)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="STAGE.KEY=VALUE", help="Set any option.", rich_help_panel=_RUN
        ),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Stop after so many seconds.", rich_help_panel=_RUN)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Enhance a camera, a screen or a stream while it runs."""
    from vidpipe.live.session import Live

    built = live_graph(
        source,
        graph=graph,
        capture={"size": size, "rate": rate},
        enhance={
            "tiers": tier,
            "strength": strength,
            "latency_budget_s": None if latency_budget is None else seconds(latency_budget),
            "threads": threads,
        },
        device=device,
        precision=precision,
        audio=audio,
        virtual_camera=virtual_camera,
        streams=stream or [],
        records=record or [],
        page=page is not None,
        overrides=set_ or [],
    )
    host, port = page_address(page) if page is not None else ("", 0)
    place(built, size, threads or 0)
    running = Live(built, snapshots=snapshots)
    screen = _Screen(running, as_json)
    stop = threading.Event()

    def halt() -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with ExitStack() as stack:
        stack.enter_context(interrupts(halt, halt))
        url = None
        if page is not None:
            from vidpipe.live.server import Server

            server = Server(running, host, port, token)
            stack.callback(server.stop)
            url = server.url
        running.start()
        if page is not None:
            server.start()
        stack.enter_context(screen.shown(stop, url))
        clock, ended = running.clock, False
        end_s = None if duration is None else clock.now_s() + duration
        while not stop.is_set() and not ended and (end_s is None or clock.now_s() < end_s):
            ended = running.wait(0.25)
            screen.draw()
    report = running.stop()
    screen.finish(report)


def live_graph(
    source: str | None,
    *,
    graph: str | None = None,
    capture: dict[str, Any] | None = None,
    enhance: dict[str, Any] | None = None,
    device: str | None = None,
    precision: str | None = None,
    audio: bool | None = None,
    virtual_camera: bool = False,
    streams: list[str] | None = None,
    records: list[Path] | None = None,
    page: bool = False,
    overrides: list[str] | None = None,
) -> Graph:
    """Return the graph of a live filter.

    Args:
        source: see `parse_source`; for the graph's capture stage, if it names none.
        graph: a shipped graph or a file; by default capture, enhance and the sinks.
        capture, enhance: options for all stages of that kind; None values are left out.
        device: what all models are to run on; None and "auto" leave that to the stages.
        precision: what all models are to compute in; None leaves that to the stages.
        audio: pass sound on, where a stage has that option.
        virtual_camera, streams, records, page: sinks to add behind the last enhance stage.
        overrides: "stage.key=value" each.

    Raises:
        GraphError: the graph is wrong.
        InputError: there is nothing to read from, or nowhere to write to.
    """
    if graph is None:
        if source is None:
            raise InputError("a source is needed", hint="Write: vidpipe live camera --page 8765")
        built = Graph("capture, enhance, out")
        built.add("source", "capture", address=source)
        built.add("enhance", "enhance", "source")
    else:
        built = Graph.load(graph)
        if source is not None:
            for node in built.using("capture"):
                built.set(node.name, "address", source)
    filters = built.using("enhance")
    if not filters:
        raise InputError(f"{built.origin} has no enhance stage", hint="Use vidpipe run for it")
    last = filters[-1].name
    if virtual_camera:
        built.add(_free(built, "camera"), "virtual-camera", last)
    for url in streams or []:
        built.add(_free(built, "stream"), "stream", last, url=url)
    for path in records or []:
        built.add(_free(built, "record"), "record", last, path=str(path))
    if page:
        shown = {n.source for n in built.using("page")}
        for node in filters:
            if node.name not in shown:
                built.add(_free(built, "page"), "page", node.name)
    for use, options in (("capture", capture), ("enhance", enhance)):
        for node in built.using(use):
            for key, value in (options or {}).items():
                if value is not None:
                    built.set(node.name, key, value)
    if device not in (None, "auto"):
        for node in _with_models(built):
            built.set(node.name, "device", device)
    if precision is not None:
        for node in _with_models(built):
            built.set(node.name, "precision", precision)
    if audio is not None:
        for use in ("capture", "stream", "record"):
            for node in built.using(use):
                built.set(node.name, "audio", audio)
    for assignment in overrides or []:
        built.override(assignment)
    if not any(built.using(use) for use in ("virtual-camera", "stream", "record", "page")):
        raise InputError(
            "the picture goes nowhere",
            hint="Add --virtual-camera, --stream URL, --record FILE or --page PORT",
        )
    built.validate()
    return built


def place(graph: Graph, size: str | None = None, threads: int = 0) -> None:
    """Choose once what models run on, for the stages that leave it open.

    Args:
        graph: changed here: `device` and `chosen` of its enhance and model stages.
        size: "WIDTHxHEIGHT" of the source, where the user gave it.
        threads: threads that the models may use; 0 for all.

    Raises:
        DeviceError: nothing can run models here.
        ModelError: the model cannot be used.
    """
    from vidpipe.live.enhance import DEFAULT_TIERS, PLAIN, tier_precisions
    from vidpipe.model.choose import choose

    first: dict[str, tuple[str, str]] = {}  # model and precision that each stage's times rest on
    for node in _with_models(graph):
        if node.options.get("device", "auto") == "auto":
            tiers = [node.options["model"]] if "model" in node.options else None
            tiers = tiers or node.options.get("tiers", DEFAULT_TIERS)
            if models := [t for t in tiers if t != PLAIN]:
                asked = node.options.get("precision", "auto")
                each = tier_precisions(models, asked)
                best = each.index(asked)
                first[node.name] = (models[best], each[best])
    if not first:
        return
    given = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size or "")  # the source refuses others
    known = (int(given[1]), int(given[2])) if given else None
    model, precision = next(iter(first.values()))
    choice = choose(None, model, known, precision=precision, threads=threads)
    for name in first:
        graph.set(name, "device", choice.device)
        graph.set(name, "chosen", choice.reason)


def _with_models(graph: Graph) -> list[Node]:
    return [*graph.using("enhance"), *graph.using("model")]


def _free(graph: Graph, name: str) -> str:
    number = 1
    while (free := name if number == 1 else f"{name}{number}") in graph.nodes:
        number += 1
    return free


def seconds(text: str) -> float:
    """Read "50ms", "0.05s" or "0.05".

    Raises:
        InputError: it is none of them.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)?", text.strip())
    if found is None:
        raise InputError(f"latency budget '{text}' is not understood", hint="Write 50ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def page_address(text: str) -> tuple[str, int]:
    """Read "8765", "0.0.0.0:8765" or "[::1]:8765".

    Raises:
        InputError: it is none of them.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"page address '{text}' is not understood", hint="Write HOST:PORT or PORT")
    return host, int(port)


class _Screen:
    """Prints what a filter does: JSON lines, or a table that is drawn again and again."""

    def __init__(self, running: Live, as_json: bool) -> None:
        self._running = running
        self._as_json = as_json
        self._out = Console()
        self._err = Console(stderr=True)
        self._chosen: str | None = None
        self._last_s = float("-inf")
        self._last_event = ""
        self._table: Any = None
        self._lock = threading.Lock()
        running.listener = self._event

    @contextmanager
    def shown(self, stop: threading.Event, url: str | None) -> Iterator[None]:
        """Draw and take keys as long as the block runs."""
        from rich.live import Live as Redrawn

        from vidpipe.live import keys

        if self._as_json:
            self._json({"event": "started", "page": url, **self._running.state()})
            yield
            return
        for line in sorted({f.chosen for f in self._running.filters.values()} - {""}):
            self._err.print(line, markup=False, highlight=False, soft_wrap=True)
        if url is not None:
            self._err.print(f"page: {url}", markup=False, highlight=False, soft_wrap=True)

        def take(key: str) -> None:
            self._key(key, stop)

        with keys.listening(take) as listening:
            if listening:
                self._err.print(keys.HELP, markup=False, highlight=False)
            if not self._err.is_terminal:
                yield
                return
            with Redrawn(console=self._err, auto_refresh=False, transient=True) as self._table:
                yield

    def _key(self, key: str, stop: threading.Event) -> None:
        from vidpipe.live import keys

        names = [*self._running.filters]
        chosen = self._chosen or names[0]
        stage = self._running.filters[chosen]
        command = keys.command_for(key, stage.controls.settings, stage.tiers)
        try:
            if command == keys.QUIT:
                stop.set()
            elif command == keys.NEXT:
                self._chosen = names[(names.index(chosen) + 1) % len(names)]
            elif command == keys.SNAPSHOT:
                self._running.snapshot(chosen)
            elif isinstance(command, dict):
                self._running.control(command, chosen)
        except VidpipeError as error:
            self._last_event = str(error)
        self.draw(now=True)

    def _event(self, event: dict[str, Any]) -> None:
        if self._as_json:
            self._json(event)
            return
        words = [f"{k} {v}" for k, v in event.items() if k not in ("number", "time_s", "event")]
        self._last_event = f"{event['time_s']:.1f} s {event['event']}: {', '.join(words)}"
        if self._table is None:
            self._err.print(self._last_event, markup=False, highlight=False, soft_wrap=True)

    def draw(self, *, now: bool = False) -> None:
        """Show the figures, once a second in JSON and four times a second on a terminal."""
        time_s = self._running.clock.now_s()
        if self._as_json:
            if time_s - self._last_s >= 1:
                self._last_s = time_s
                self._json({"event": "state", **self._running.state()})
        elif self._table is not None and (now or time_s - self._last_s >= 0.2):
            self._last_s = time_s
            with self._lock:
                self._table.update(self._render(self._running.state()), refresh=True)

    def _render(self, state: dict[str, Any]) -> Group:
        lines = []
        for name, figures in state["filters"].items():
            source = state["sources"].get(figures["source"], {})
            line = Text(overflow="fold")
            if source.get("state") == "lost":
                line.append(" SOURCE LOST ", "bold white on red")
            elif figures["frozen"]:
                line.append(" FROZEN ", "bold white on red")
            elif figures["active"]:
                line.append(" ACTIVE ", "bold white on green")
            else:
                line.append(" OFF ", "bold white on bright_black")
            line.append(f" {name}: {figures['tier_now']}")
            line.append(f" ({figures['tier']})  strength {figures['strength']:.2f}")
            line.append(f"  budget {figures['latency_budget_ms']} ms  {figures['provider']}")
            if figures["precision"] is not None:
                line.append(f" {figures['precision']}")
            drops = source.get("drops", {}).get("entrance", 0)
            line.append(f"  dropped at the entrance: {drops}")
            lines.append(line)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("output", "fps", "p50", "p95", "p99 ms", "dropped"):
            table.add_column(heading, justify="left" if heading == "output" else "right")
        for name, sink in state["sinks"].items():
            times = [
                "" if sink[k] is None else f"{sink[k]:.0f}" for k in ("p50_ms", "p95_ms", "p99_ms")
            ]
            drops = ", ".join(f"{n} {why}" for why, n in sink["drops"].items()) or "0"
            table.add_row(f"{name}: {sink['state']}", f"{sink['rate']:.1f}", *times, drops)
        return Group(*lines, table, Text(self._last_event, style="dim", overflow="fold"))

    def finish(self, report: Any) -> None:
        """Print what the run came to."""
        state = self._running.state()
        if self._as_json:
            self._json(
                {
                    "event": "report",
                    **state,
                    "problems": report.problems if report else ["a stalled output was cut off"],
                }
            )
            return
        self._out.print(self._render(state))
        if report is None:
            self._err.print("a stalled output was cut off", style="yellow")
        for problem in report.problems if report else []:
            self._err.print(problem, style="yellow", markup=False)

    def _json(self, value: dict[str, Any]) -> None:
        with self._lock:
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()
