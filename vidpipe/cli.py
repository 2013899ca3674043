"""The command line: parsing and printing only.

Exit codes: 0 done; 1 a bug; 2 bad input, options or output; 3 the device or an optional
package is missing; 4 the run ended but its report does not add up; 130 stopped by the user.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vidpipe import __version__
from vidpipe.errors import InputError, VerificationError, VidpipeError
from vidpipe.graph import Graph, shipped_graphs
from vidpipe.interrupts import interrupts
from vidpipe.pipeline import Pipeline, Report, slowest_stage
from vidpipe.providers.runtime import forbid_downloads

if TYPE_CHECKING:
    from rich.console import Console

    from vidpipe.segments import SplitRun

EXIT_STOPPED = 130

_ELSEWHERE = {
    "live": "vidpipe.live.command",
    "bench": "vidpipe.commands.bench",
    "models": "vidpipe.commands.models",
    "devices": "vidpipe.commands.devices",
    "doctor": "vidpipe.commands.devices",
    "cache": "vidpipe.commands.cache",
}
"""Modules of commands that are loaded when they are called or listed."""


class _Commands(TyperGroup):
    """The commands of this module, and those of `_ELSEWHERE`."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = [name for name in super().list_commands(ctx) if name not in _ELSEWHERE]
        return [*own, *_ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _ELSEWHERE:
            self._load(cmd_name)
        elif cmd_name not in self.commands:  # the answer suggests names that are alike
            for name in _ELSEWHERE:
                self._load(name)
        return super().get_command(ctx, cmd_name)

    def _load(self, name: str) -> None:
        found = getattr(import_module(_ELSEWHERE[name]), name)
        holder = typer.Typer()
        if isinstance(found, typer.Typer):
            holder.add_typer(found, name=name)
        else:
            holder.command(name)(found)
        self.commands[name] = typer.main.get_group(holder).commands[name]


app = typer.Typer(
    cls=_Commands,
    help="Real-time video enhancement.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cache
def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


class Quality(StrEnum):
    """Tiers of the built-in models."""

    nano = "nano"
    fast = "fast"
    quality = "quality"


class Prefer(StrEnum):
    """What a device is chosen and set for."""

    speed = "speed"
    latency = "latency"
    efficiency = "efficiency"


class Precision(StrEnum):
    """What models compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    fp8 = "fp8"
    fp4 = "fp4"


class Deinterlace(StrEnum):
    """When to deinterlace."""

    auto = "auto"
    always = "always"
    never = "never"


def main() -> None:
    """Run the command line and exit with a documented code."""
    try:
        sys.exit(app(standalone_mode=False))
    except VidpipeError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _console(stderr=True).print("vidpipe: stopped")
        sys.exit(EXIT_STOPPED)
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)


def _print_error(error: VidpipeError) -> None:
    _print_text(f"vidpipe: error: {error}", "red", stderr=True)


def _print_text(text: str, style: str = "", *, stderr: bool = False) -> None:
    """Print a line as it is, however long: no wrapping and no markup."""
    _console(stderr).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        _print_text(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Real-time video enhancement."""


_PICTURE, _FILE, _RUN = "The picture", "The output file", "The run"


@app.command()
def run(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="IN... OUT",
            help="One or more input files, then the output file, or a folder for several.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Built-in model or ONNX file.", rich_help_panel=_PICTURE),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Enlargement, 1 to 16. [default: the model's, or 2]", rich_help_panel=_PICTURE
        ),
    ] = None,
    denoise: Annotated[
        float | None,
        typer.Option(
            help="Remove noise and artefacts, 0 to 1. [default: 1]", rich_help_panel=_PICTURE
        ),
    ] = None,
    quality: Annotated[
        Quality | None,
        typer.Option(
            help="Tier of the built-in models. [default: nano on a CPU, fast on a GPU]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option(help="Shipped graph or TOML file.", rich_help_panel=_PICTURE),
    ] = None,
    deinterlace: Annotated[
        Deinterlace | None,
        typer.Option(help="Deinterlace with bwdif. [default: auto]", rich_help_panel=_PICTURE),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="h264, hevc, av1, vp9, ffv1, prores... or an FFmpeg encoder.",
            rich_help_panel=_FILE,
        ),
    ] = None,
    crf: Annotated[
        float | None, typer.Option(help="Constant quality.", rich_help_panel=_FILE)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The encoder's preset.", rich_help_panel=_FILE)
    ] = None,
    pix_fmt: Annotated[
        str | None,
        typer.Option(help="Pixel format. [default: the source's]", rich_help_panel=_FILE),
    ] = None,
    encoder_option: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Any option of the encoder.", rich_help_panel=_FILE),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out: audio, subtitles, data, attachments, chapters... or a stream number.",
            rich_help_panel=_FILE,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_FILE)
    ] = False,
    start: Annotated[
        float | None, typer.Option(help="Start here, in seconds.", rich_help_panel=_RUN)
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Only so many seconds.", rich_help_panel=_RUN)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="What models run on: auto, cpu, cuda[:N], cuda:all, rtx, openvino, webgpu, "
            "directml, winml:NAME. [default: auto]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    prefer: Annotated[
        Prefer, typer.Option(help="What the device is chosen and set for.", rich_help_panel=_RUN)
    ] = Prefer.speed,
    precision: Annotated[
        Precision,
        typer.Option(help="What models compute in; fp8, fp4: rtx only.", rich_help_panel=_RUN),
    ] = Precision.auto,
    wait_compile: Annotated[
        bool,
        typer.Option(
            "--wait-compile",
            help="Wait for a compiler rather than begin on the CPU.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Download nothing.", rich_help_panel=_RUN)
    ] = False,
    allow_cpu_nodes: Annotated[
        bool,
        typer.Option(
            "--allow-cpu-nodes",
            help="Let the CPU run what the device does not take of a model.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of each stage; 0: as many as fit.", rich_help_panel=_RUN),
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="auto, off or WIDTHxHEIGHT. [default: auto]", rich_help_panel=_RUN),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Memory for the model, such as 2G.", rich_help_panel=_RUN),
    ] = None,
    vram_limit: Annotated[
        str | None,
        typer.Option(help="GPU memory for frames and models, such as 4G.", rich_help_panel=_RUN),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="STAGE.KEY=VALUE", help="Set any option.", rich_help_panel=_RUN
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Write a profile for Perfetto.", rich_help_panel=_RUN),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Enhance video files; nothing else of them is lost."""
    from vidpipe.api import make_run
    from vidpipe.trace import Tracer

    if offline:
        forbid_downloads()
    jobs = _jobs(paths)
    options = {
        "start_s": start,
        "duration_s": duration,
        "deinterlace": deinterlace.value if deinterlace else None,
        "device": device,
        "prefer": prefer.value,
        "precision": precision.value,
        "wait_compile": wait_compile or None,
        "allow_cpu_nodes": allow_cpu_nodes or None,
        "threads": threads,
        "tile": tile,
        "memory_limit": memory_limit,
        "codec": codec,
        "crf": crf,
        "preset": preset,
        "pix_fmt": pix_fmt,
        "encoder_options": dict(_pair(text) for text in encoder_option or []) or None,
        "drop": drop,
        "overwrite": overwrite or None,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    worst = 0
    tracer = None if profile is None else Tracer(profile)
    for source, destination in jobs:
        try:
            pipeline = make_run(
                source,
                destination,
                graph=graph,
                model=model,
                scale=scale,
                denoise=denoise,
                quality=quality.value if quality else None,
                overrides=set_ or [],
                tracer=tracer,
                vram_limit=vram_limit,
                **given,
            )
            report = _run(pipeline, source, as_json)
            _print_report(report, destination, as_json)
            code = _exit_code(report)
        except VidpipeError as error:
            if as_json:
                _print_json({"event": "error", "input": str(source), "message": str(error)})
            _print_error(error)
            code = error.exit_code
        worst = worst or code
        if code == EXIT_STOPPED:
            break
    if tracer is not None:
        tracer.write()
    raise typer.Exit(worst)


def _exit_code(report: Report) -> int:
    if report.outcome == "stopped":
        return EXIT_STOPPED
    if any(stage.facts.get("damaged") for stage in report.stages):
        return InputError.exit_code
    return VerificationError.exit_code if report.problems else 0


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"encoder option '{text}' is not understood", hint="Write KEY=VALUE")
    return key, value


def _jobs(paths: list[Path]) -> list[tuple[Path, Path]]:
    """Return (input, output) pairs."""
    from vidpipe.api import output_path

    if len(paths) < 2:
        raise InputError("an input and an output are needed", hint="Write: vidpipe run IN... OUT")
    *sources, last = paths
    if not last.is_dir():
        if len(sources) == 1:
            return [(sources[0], last)]
        raise InputError(
            f"there are {len(sources)} inputs, and '{last}' is not a folder",
            hint="Make the folder first, and name it last",
        )
    jobs = [(source, output_path(source, last)) for source in sources]
    outputs = [destination for _, destination in jobs]
    for destination in outputs:
        if outputs.count(destination) > 1:
            raise InputError(
                f"two inputs would become '{destination}'", hint="Run them one at a time"
            )
    return jobs


def _run(pipeline: Pipeline | SplitRun, source: Path, as_json: bool) -> Report:
    def finish() -> None:
        if pipeline.written()[0]:
            _print_text(
                "vidpipe: finishing what was begun; press Ctrl-C again to stop now", stderr=True
            )
            pipeline.stop()
        else:  # no file can be made of no frame
            pipeline.abort()

    pipeline.plan()
    frames = pipeline.sources()[0].expected_frames
    duration_s = pipeline.sources()[0].expected_s
    with interrupts(finish, pipeline.abort):
        pipeline.start()
        if as_json:
            while not pipeline.wait(0.5):
                _print_json({"event": "progress", "input": str(source), **_progress(pipeline)})
        else:
            _show_progress(pipeline, source.name, frames, duration_s)
    return pipeline.report()


def _progress(pipeline: Pipeline | SplitRun) -> dict[str, Any]:
    """Return the figures of the progress line."""
    source = pipeline.sources()[0]
    frames, media_s = pipeline.written()
    elapsed_s = pipeline.elapsed_s()
    slowest = slowest_stage(pipeline.progress())
    eta_s = None
    if source.expected_frames and frames:
        eta_s = elapsed_s * max(0, source.expected_frames - frames) / frames
    elif source.expected_s and media_s > 0:
        eta_s = elapsed_s * max(0.0, source.expected_s - media_s) / media_s
    return {
        "frames": frames,
        "expected_frames": source.expected_frames,
        "media_s": round(media_s, 3),
        "expected_s": source.expected_s,
        "elapsed_s": round(elapsed_s, 3),
        "fps": round(frames / elapsed_s, 3) if elapsed_s > 0 else 0.0,
        "speed": round(media_s / elapsed_s, 3) if elapsed_s > 0 else 0.0,
        "eta_s": None if eta_s is None else round(eta_s, 1),
        "slowest": slowest.name if slowest else None,
        "status": _status(pipeline),
    }


def _status(pipeline: Pipeline | SplitRun) -> str:
    """Return what models still wait for, or ""."""
    if not isinstance(pipeline, Pipeline):
        return ""
    names = [stage.name for stage in pipeline.progress() if stage.use == "model"]
    told = (getattr(pipeline.actor(name), "status", "") for name in names)
    return "; ".join(text for text in told if text)


def _show_progress(
    pipeline: Pipeline | SplitRun, name: str, frames: int | None, duration_s: float | None
) -> None:
    # By now the stages are opening: nobody waits for this.
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[line]}", markup=False),
        TimeRemainingColumn(),
    )
    err = _console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(name, total=frames or duration_s, line="starting")
        while not pipeline.wait(0.1):
            seen = _progress(pipeline)
            of = f"/{frames}" if frames else ""
            line = f"{seen['frames']}{of} frames  {seen['fps']:.1f} fps  {seen['speed']:.2f}x"
            if seen["slowest"]:
                line += f"  slowest: {seen['slowest']}"
            if seen["status"]:
                line += f"  {seen['status']}"
            done = seen["frames"] if frames else seen["media_s"]
            bar.update(task, completed=done, line=line)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201 - rich would wrap the line


def _print_report(report: Report, destination: Path, as_json: bool) -> None:
    if as_json:
        _print_json({"event": "report", "output": str(destination), **report.to_dict()})
    else:
        speed = report.media_s / report.wall_s if report.wall_s else 0.0
        frames = min((s.frames_in for s in report.stages if s.frames_out == 0), default=0)
        line = (
            f"{destination}: {frames} frames, {report.media_s:.3f} s of video in "
            f"{report.wall_s:.1f} s ({frames / report.wall_s:.1f} fps, {speed:.2f} times real time)"
        )
        if report.first_frame_s is not None:
            line += f", first frame after {report.first_frame_s:.2f} s"
        _print_text(line)
        width = max(len(stage.name) for stage in report.stages)
        _print_text(f"  {'stage':{width}}  {'in':>6}  {'out':>6}  {'fps':>7}", "dim")
        for stage in report.stages:
            fps = f"{stage.fps:.1f}" if stage.fps else ""
            mark = " (slowest)" if stage is report.slowest else ""
            _print_text(
                f"  {stage.name:{width}}  {stage.frames_in or '':>6}  {stage.frames_out or '':>6}"
                f"  {fps:>7}{mark}  {stage.facts.get('summary', '')}"
            )
        if report.outcome == "stopped":
            _print_text(f"stopped early: {destination} is complete up to {report.media_s:.3f} s")
        for note in report.notes:
            _print_text(f"vidpipe: note: {note}", "yellow", stderr=True)
    for problem in report.problems:
        _print_text(f"vidpipe: problem: {problem}", "red", stderr=True)


@app.command()
def graphs() -> None:
    """List the graphs that come with vidpipe."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("graph")
    table.add_column("what it does")
    for name in shipped_graphs():
        table.add_row(name, Graph.load(name).title)
    _console().print(table, markup=False)


@app.command()
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="REF OUT...",
            help="The clip that counts as the truth, then clips of the same size.",
            show_default=False,
        ),
    ],
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Write crops side by side where they differ most."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Compare no more than so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure how close clips come to a reference: PSNR, SSIM, VMAF, flicker."""
    from vidpipe.compare import compare as compare_files

    if len(paths) < 2:
        raise InputError("two clips are needed", hint="Write: vidpipe compare REF OUT...")
    reference, *outputs = paths
    found = compare_files(reference, outputs, sheet=sheet, max_frames=frames)
    if as_json:
        _print_json(found.as_dict())
        return
    width = max(len(score.name) for score in found.scores)
    _print_text(
        f"{'clip':{width}}  frames   PSNR-Y   SSIM-Y  VMAF-NEG  flicker",
        "dim",
    )
    for score in found.scores:
        vmaf = "n/a" if score.vmaf_neg is None else f"{score.vmaf_neg:.2f}"
        _print_text(
            f"{score.name:{width}}  {score.frames:>6}  {score.psnr_db:>7.2f}  {score.ssim:>7.4f}"
            f"  {vmaf:>8}  {score.flicker:>7.3f}"
        )
    if sheet is not None:
        _print_text(f"crops in {sheet}: the reference, then the clips in this order")


@app.command()
def probe(
    path: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what a media file holds."""
    from vidpipe.media.probe import probe as probe_file

    info = probe_file(path)
    if as_json:
        _print_json(info.to_dict())
        return
    video = info.video
    lines = [
        f"{info.path}: {info.container}, {info.size / 1e6:.2f} MB"
        + (f", {info.duration_s:.3f} s" if info.duration_s is not None else ""),
        f"  picture  {video.width}x{video.height} {video.pixel_format}"
        f"{' interlaced' if video.interlaced else ''}, "
        + (f"{float(video.rate):.5g} fps ({video.rate_mode})" if video.rate else "variable rate"),
    ]
    for stream in info.streams:
        marks = [stream.language or "", *stream.disposition]
        marks.append(f"{stream.duration_s:.3f} s" if stream.duration_s is not None else "")
        facts = ", ".join(mark for mark in marks if mark and mark != "und")
        lines.append(f"  stream   {stream.index}: {stream.kind} {stream.codec}  {facts}".rstrip())
    lines += [f"  chapter  {c.start_s:.3f} to {c.end_s:.3f} s  {c.title}" for c in info.chapters]
    lines += [f"  tag      {key}: {value}" for key, value in info.metadata.items()]
    for line in lines:
        _print_text(line)


if __name__ == "__main__":
    main()
