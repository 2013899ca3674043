"""Compare a finished file with the one it was made from."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av.container
import av.error
import av.stream

from vidpipe.media.containers import Container
from vidpipe.media.passthrough import stream_tags
from vidpipe.media.probe import MediaInfo, StreamInfo, codec_name, fraction, is_cover, open_input

_SOUND_EDGE_S = 0.25  # priming and padding, which containers count differently
_LOOK_AHEAD = 32  # packets among which the first picture to be shown is


def compare(
    path: Path,
    container: Container,
    source: MediaInfo,
    report: dict[str, Any],
    *,
    whole: bool,
) -> dict[str, Any]:
    """Read a file's header back and say what differs from the source.

    Args:
        path: the finished file.
        container: its format.
        source: what it was made from.
        report: of the writer; says which streams were to be kept.
        whole: every frame of the source was read, so sound must be as long as it was.

    Returns:
        `lost`: lines about tags that the container did not keep; `problems`: lines about
        what should be there and is not; `start_shift_s`: how much later than in the source
        all streams begin, where a container takes no times before zero.
    """
    lost: list[str] = []
    problems: list[str] = []
    if report["packets"] != report["frames"]:
        problems.append(f"{report['frames']} frames became {report['packets']} packets")
    problems += _short_sound(report["streams"]) if whole else []
    kept = {s["index"]: s for s in report["streams"] if s["action"] in ("copy", "transcode")}
    with open_input(path) as written:
        found = [s for s in written.streams if s.type != "data" or s.discard.value < 48]
        wanted = [s for s in source.streams if s.index == source.video_index or s.index in kept]
        if len(found) < len(wanted):
            problems.append(f"only {len(found)} of {len(wanted)} streams are in the output")
        lost += _lost_tags("the file", source.metadata, dict(written.metadata))
        for stream, info in _pairs(found, wanted):
            tags = stream_tags(info.metadata, container)
            if info.kind in ("attachment", "cover"):
                continue
            lost += _lost_tags(str(info), tags, dict(stream.metadata))
            if info.index in kept and codec_name(stream) != kept[info.index]["codec"]:
                problems.append(f"{info} reads as {codec_name(stream)} in the output")
        chapters = len(written.chapters())
        if chapters != report["chapters"]:
            problems.append(f"{chapters} of {report['chapters']} chapters are in the output")
        shift = _first_time(written)
    if shift is not None and report["first_pts"] is not None:
        shift -= report["first_pts"] * Fraction(report["time_base"])
    return {"lost": lost, "problems": problems, "start_shift_s": round(float(shift or 0), 6)}


def _short_sound(streams: list[dict[str, Any]]) -> list[str]:
    """Say which sound has another duration than in the source, by more than its edges."""
    lines = []
    for stream in streams:
        expected_s = stream["source_duration_s"]
        if stream["kind"] != "audio" or expected_s is None or stream["end_s"] is None:
            continue
        copied_s = stream["end_s"] - stream["begin_s"]
        if abs(copied_s - expected_s) > max(_SOUND_EDGE_S, 0.01 * expected_s):
            lines.append(
                f"{copied_s:.3f} of the {expected_s:.3f} s of audio stream {stream['index']} "
                "are in the output"
            )
    return lines


def _pairs(found: list[Any], wanted: list[StreamInfo]) -> list[tuple[Any, StreamInfo]]:
    """Pair streams by kind: some muxers write attachments and covers last."""
    left = list(found)
    result = []
    for info in wanted:
        kind = {"cover": "video"}.get(info.kind, info.kind)
        match = next(
            (s for s in left if s.type == kind and is_cover(s) == (info.kind == "cover")), None
        )
        if match is not None:
            left.remove(match)
            result.append((match, info))
    return result


def _lost_tags(where: str, before: dict[str, str], after: dict[str, str]) -> list[str]:
    have = {k.lower() for k in after}
    ignored = {
        "encoder",
        "major_brand",
        "minor_version",
        "compatible_brands",
        "handler_name",
        "vendor_id",
        "duration",
        "alpha_mode",
        "timecode",
    }
    same = {"title": "name", "name": "title"}
    lines = []
    for key, value in before.items():
        name = key.lower()
        gone = name not in have and same.get(name) not in have
        if gone and name not in ignored and not (name == "language" and value == "und"):
            lines.append(f"{where}: metadata '{key}'")
    return lines


def _first_time(written: av.container.InputContainer) -> Fraction | None:
    """Return when the first picture is shown, in seconds."""
    video = next((s for s in written.streams.video if not is_cover(s)), None)
    if video is None:
        return None
    first: Fraction | None = None
    try:
        for count, packet in enumerate(written.demux(video)):
            base = fraction(packet.time_base)
            if packet.pts is not None and base is not None:
                time = packet.pts * base
                first = time if first is None else min(first, time)
            if count >= _LOOK_AHEAD:
                break
    except av.error.FFmpegError:
        return first
    return first
