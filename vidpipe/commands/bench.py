"""`vidpipe bench`: parsing and printing only."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vidpipe.device import CPU, Device
from vidpipe.errors import Cancelled, InputError
from vidpipe.interrupts import interrupts

out = Console()
err = Console(stderr=True)

_DEFAULT_STEADY = 1000


class End(StrEnum):
    """Where a pipeline can end."""

    null = "null"
    host = "host"
    file = "file"


def bench(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[IN]", help="A file; a clip is made if none is given."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to measure, several times for several; A+B for two in a row. "
            "[default: nano-2x on a CPU, fast-2x on a GPU]"
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda or cuda:N; cuda:all or a list such as cuda:0,cuda:0 measures a file "
            "split over several GPUs, or decoders of one."
        ),
    ] = "cpu",
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size of the clip that is made. [default: 1920x1080]"),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Timed frames of each turn. [default: as many as take 0.4 s]"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of everything, at least 3.")] = 3,
    to: Annotated[
        list[End] | None,
        typer.Option(help="Pipelines to measure, several times for several. [default: all]"),
    ] = None,
    steady: Annotated[
        int | None,
        typer.Option(
            help="Frames over which memory and host time are watched. "
            "[default: 1000 on one GPU, else 0]"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the figures as bars, .svg or .png.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a profile for Perfetto, .json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure every stage alone and the whole pipeline, after checking the output."""
    from vidpipe.bench import ENDS, Options
    from vidpipe.bench import bench as measure
    from vidpipe.bench.chart import check_chart, draw
    from vidpipe.segments import devices_of
    from vidpipe.trace import Tracer

    several = devices_of(device)
    where = several[0] if several else Device.parse(device)
    names = model or ["nano-2x" if where == CPU else "fast-2x"]
    if source is not None and size is not None:
        raise InputError("--size is for the clip that is made", hint="Leave out IN or --size")
    options = Options(
        chains=tuple(_chain(name) for name in names),
        source=source,
        device=where,
        devices=tuple(several),
        decoders=None if device == "cuda:all" else 1,
        size=_size(size or "1920x1080"),
        frames=frames,
        repeats=repeats,
        ends=tuple(end.value for end in to) if to else ENDS,
        steady=(0 if where == CPU or several else _DEFAULT_STEADY) if steady is None else steady,
    )
    if plot is not None:
        check_chart(plot)
    tracer = None if profile is None else Tracer(profile)
    asked: list[str] = []

    def stop() -> None:
        asked.append("stop")
        if len(asked) == 2:  # the first one waits for the turn at hand
            raise KeyboardInterrupt

    with err.status("starting") as status, interrupts(stop, stop):

        def say(text: str) -> None:
            if asked:
                raise Cancelled("stopped; nothing was kept")
            status.update(text)

        result = measure(options, say=say, tracer=tracer)
    if tracer is not None:
        tracer.write()
    if plot is not None:
        draw(result, plot)
    if as_json:
        print(json.dumps(result), flush=True)  # noqa: T201 - rich would wrap the line
    else:
        _print_result(result)


def _chain(text: str) -> tuple[str, ...]:
    """Return the models of "A+B"; a file may have a plus in its name."""
    return (text,) if Path(text).is_file() else tuple(part for part in text.split("+") if part)


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise InputError(f"size '{text}' is not understood", hint="Write WIDTHxHEIGHT")
    return int(width), int(height)


def _line(text: str, style: str = "", console: Console = out) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_result(result: dict[str, Any]) -> None:
    machine = result["machine"]
    gpu = machine.get("gpu")
    where = f"{gpu['name']}, CUDA {gpu['cuda_runtime']}; " if gpu else ""
    _line(f"{where}{machine['processor']}, {machine['cores']} cores")
    for chain in result["chains"]:
        _print_chain(chain)


def _print_chain(chain: dict[str, Any]) -> None:
    one, two, verified = chain["input"], chain["output"], chain["verified"]
    _line(
        f"{' + '.join(chain['models'])}: {one['width']}x{one['height']} {one['format']} to "
        f"{two['width']}x{two['height']}"
        + (f", split over {', '.join(chain['workers'])}" if len(chain["workers"]) > 1 else "")
    )
    same = "identical" if verified["identical"] else f"at least {verified['psnr_db']:.1f} dB"
    _line(f"  {verified['frames']} frames against the CPU path: {same}")
    width = max(len(figure["name"]) for figure in chain["figures"])
    _line(f"  {'':{width}}  {'fps':>8}  {'ms':>8}  {'cpu ms':>8}  share", "dim")
    for kind in ("stage", "reference", "pipeline"):
        for figure in chain["figures"]:
            if figure["kind"] == kind:
                _line(f"  {_row(figure, width)}")
    steady = chain["steady"]
    if steady is not None:
        _print_steady(steady)
    for note in chain["notes"]:
        _line(f"vidpipe: note: {note}", "yellow", err)
    for problem in chain["problems"]:
        _line(f"vidpipe: problem: {problem}", "red", err)


def _row(figure: dict[str, Any], width: int) -> str:
    row = (
        f"{figure['name']:{width}}  {figure['fps']:>8.1f}  {figure['ms']:>8.3f}"
        f"  {figure['processor_ms']:>8.3f}"
    )
    if figure["kind"] == "pipeline":
        row += f"  {figure['share_of_lowest']:.3f} of {figure['lowest_stage']}"
        if len(figure["sum_of"]) > 1:
            row += f", {figure['share_of_sum']:.3f} of the sum of {', '.join(figure['sum_of'])}"
    return row


def _print_steady(steady: dict[str, Any]) -> None:
    waits = ", ".join(f"{name} {count:g}" for name, count in steady["host_waits_a_frame"].items())
    memory = ""
    if steady["pool_before"]:
        memory = "; memory flat" if steady["pool_flat"] else f"; grew {steady['pool_growth']}"
    _line(
        f"  over {steady['frames']} frames: {steady['processor_ms']:.3f} ms of processor time "
        f"a frame; host waits a frame: {waits or 'none'}{memory}"
    )
