"""HDR10 static metadata as the encoders want it."""

from __future__ import annotations

from fractions import Fraction

from vidpipe.media.probe import ContentLight, MasteringDisplay

_PARAMETERS = {
    "libx264": "x264-params",
    "libx265": "x265-params",
    "libsvtav1": "svtav1-params",
}


def writes_hdr(encoder: str) -> bool:
    """Say whether an encoder puts HDR metadata into its stream."""
    return encoder in _PARAMETERS


def hdr_options(
    encoder: str,
    options: dict[str, str],
    mastering: MasteringDisplay | None,
    light: ContentLight | None,
) -> dict[str, str]:
    """Return an encoder's options with HDR metadata added to them.

    Mastering display: H.265 (ITU-T, D.2.28), in steps of 0.00002 and 0.0001 cd/m2; for
    SVT-AV1 in plain numbers.
    """
    if not writes_hdr(encoder) or (mastering is None and light is None):
        return options
    parts = []
    if mastering is not None:
        red, green, blue = mastering.primaries
        plain = encoder == "libsvtav1"

        def pair(x: Fraction, y: Fraction, scale: int = 50000) -> str:
            if plain:
                return f"({float(x):.5f},{float(y):.5f})"
            return f"({round(x * scale)},{round(y * scale)})"

        low, high = mastering.luminance
        text = (
            f"G{pair(*green)}B{pair(*blue)}R{pair(*red)}WP{pair(*mastering.white)}"
            f"L{pair(high, low, 10000)}"
        )
        parts.append({"libx265": "master-display="}.get(encoder, "mastering-display=") + text)
    if light is not None:
        name = {"libx264": "cll", "libx265": "max-cll", "libsvtav1": "content-light"}[encoder]
        parts.append(f"{name}={light.max_cll},{light.max_fall}")
    if encoder == "libx265":
        parts.append("hdr10=1")
    key = _PARAMETERS[encoder]
    given = options.get(key)
    return {**options, key: ":".join(([given] if given else []) + parts)}
