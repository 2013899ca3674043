"""`vidpipe models`: parsing and printing only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vidpipe.errors import InputError

if TYPE_CHECKING:
    from vidpipe.frame import Frame

out = Console()
err = Console(stderr=True)

models = typer.Typer(
    help="List the built-in models, check one, or make a faster copy of one.",
    invoke_without_command=True,
)


@models.callback()
def list_models(
    context: typer.Context,
    check: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Run this model and hold it to what it promises."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the built-in models, or check one, built-in or a file."""
    if context.invoked_subcommand is not None:
        return
    from vidpipe.model import probe as trial
    from vidpipe.model.descriptor import builtin_models, describe, find_model
    from vidpipe.model.variant import int8_copy

    if check is None:
        found = builtin_models()
    else:
        found = [describe(find_model(check))]
        trial.check(found[0])
    copies = {d.name: int8_copy(d) for d in found}
    if as_json:
        listed = [
            d.to_dict() | {"int8": str(copy.path) if (copy := copies[d.name]) else None}
            for d in found
        ]
        _print_json({"models": listed})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("model", "scale", "strength", "KiB", "int8", "what it does"):
        table.add_column(heading)
    for d in found:
        table.add_row(
            d.name,
            f"{d.scale}x",
            "yes" if d.strength else "",
            f"{d.path.stat().st_size / 1024:.0f}",
            "yes" if copies[d.name] or d.precision == "int8" else "",
            d.description,
        )
    out.print(table, markup=False)


@models.command()
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Built-in model or ONNX file, in float32.")
    ],
    calibrate: Annotated[
        list[Path],
        typer.Option(
            metavar="CLIP",
            help="Frames like those it is meant for; several times for several clips.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="[default: MODEL-int8.onnx, or MODEL-fp16.onnx]"
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Make float16, for GPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Make a copy of a model in int8, and hold it to the original on frames of the clip."""
    from vidpipe.compare import VmafMeter, has_vmaf
    from vidpipe.model.descriptor import describe, find_model
    from vidpipe.model.quantize import FLOORS, convert, pick
    from vidpipe.model.variant import converted_path

    precision = "fp16" if fp16 else "int8"
    original = describe(find_model(model))
    destination = output or Path(converted_path(Path(original.path.name), precision).name)
    if output is None and Path(model).is_file():
        destination = converted_path(original.path, precision)
    frames: list[Frame] = []
    held_out: list[Frame] = []
    for clip in calibrate:
        seen, checked = _frames(clip, len(calibrate), pick)
        frames += seen
        held_out += checked
    meter = VmafMeter() if has_vmaf() else None
    verdict = convert(original, destination, precision, frames, held_out, meter=meter)
    if as_json:
        _print_json(verdict.to_dict())
        return
    planes = ", ".join(
        f"{name} {value:.1f}" for name, value in zip("YUV", verdict.psnr_db, strict=False)
    )
    lines = [
        f"{verdict.path}: {precision}, {verdict.bytes_after / 1024:.0f} KiB "
        f"(float32: {verdict.bytes_before / 1024:.0f})",
        f"  against float32 on {verdict.frames} other frames: PSNR {planes} dB "
        f"(worst frame {verdict.worst_db:.1f}, floor {FLOORS[precision]:.0f})"
        + ("" if verdict.vmaf_neg is None else f", VMAF-NEG {verdict.vmaf_neg:.2f}"),
    ]
    if verdict.float_part:
        lines.append(f"  the {verdict.float_part} convolutions stay in float32")
    if verdict.reduced:
        lines.append("  weights within 7 bits: runs well with and without VNNI")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _frames(clip: Path, clips: int, pick: Any) -> tuple[list[Frame], list[Frame]]:
    """Return a clip's share of frames to calibrate and to compare on."""
    from vidpipe.media.decode import Decode

    def decoded() -> Iterator[Frame]:
        decoder = Decode(path=str(clip))
        try:
            decoder.plan()
            decoder.open()
            yield from decoder.frames()
        finally:
            decoder.close()

    # Counted by decoding: a file's own count may be missing or wrong.
    count = sum(1 for _ in decoded())
    wanted, checked = pick(count, clips)
    if not wanted or not checked:
        raise InputError(
            f"'{clip}' has {count} frames; some are calibrated on and others compared",
            hint="Use a clip of at least 8 frames",
        )
    seen: list[Frame] = []
    kept: list[Frame] = []
    for number, frame in enumerate(decoded()):
        if number in wanted or number in checked:
            copy = frame.replace([plane.copy() for plane in frame.planes], frame.spec)
            (seen if number in wanted else kept).append(copy)
    return seen, kept


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201 - rich would wrap the line
