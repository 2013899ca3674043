"""Which file, and which arithmetic, a model runs in: the `precision` option.

A copy in int8 is found inside the package, for the built-in models that have one, or beside a
model's own file, where `vidpipe models quantize` puts it. It counts only if it was made from the
very file that it stands for. It has to be asked for: it loses next to nothing on pictures like
those it was calibrated on, but more than can be overlooked on others, such as small text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidpipe.errors import ModelError
from vidpipe.model.descriptor import MODELS, Descriptor, describe

PRECISIONS = ("auto", "fp32", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Variant:
    """What runs in a model's place.

    Attributes:
        model: the file, the model itself or a copy of it.
        half: compute its float32 nodes in float16, where the provider can.
        precision: "fp32", "fp16" or "int8".
    """

    model: Descriptor
    half: bool
    precision: str


def converted_path(model: Path, precision: str) -> Path:
    """Return where a model's copy in another precision is looked for, and written by default."""
    if model.parent == MODELS:
        return MODELS / precision / model.name
    return model.with_name(f"{model.stem}-{precision}.onnx")


def variant(model: Descriptor, precision: str, *, on_cpu: bool) -> Variant:
    """Return what to run for a model.

    Args:
        model: as it was asked for.
        precision: one of `PRECISIONS`. "auto" is float16 on a GPU and float32 on a CPU; a
            file that is in int8 or float16 itself is taken as it is.
        on_cpu: whether the CPU computes it.

    Raises:
        ModelError: there is no such precision, or no such copy of this model.
    """
    if precision not in PRECISIONS:
        raise ModelError(
            f"precision '{precision}' is not known", hint=f"Use {', '.join(PRECISIONS)}"
        )
    if model.precision == "int8" and precision in ("auto", "int8"):
        return Variant(model, not on_cpu, "int8")
    if model.precision == "int8":
        raise ModelError(
            f"model '{model.path.name}' is in int8, {precision} was asked for",
            hint="Name its float32 file, or leave out the precision",
        )
    if precision == "int8":
        copy = int8_copy(model)
        if copy is None:
            raise ModelError(
                f"model '{model.name}' has no copy in int8",
                hint=f"Make one with: vidpipe models quantize {model.name} --calibrate CLIP",
            )
        return Variant(copy, not on_cpu, "int8")
    if precision == "fp16" and on_cpu:
        raise ModelError(
            "the CPU computes float16 models in float32",
            hint="Use --precision int8 or fp32, or a GPU",
        )
    half = not on_cpu and precision != "fp32"
    return Variant(model, half, "fp16" if half else "fp32")


def int8_copy(model: Descriptor) -> Descriptor | None:
    """Return the copy of a model in int8, or None if there is none that was made from it."""
    path = converted_path(model.path, "int8")
    if not path.is_file():
        return None
    copy = describe(path)
    return copy if copy.source_sha256 == model.sha256 else None
