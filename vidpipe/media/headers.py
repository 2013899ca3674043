"""Facts put into finished files that FFmpeg's muxers cannot be told through PyAV.

A sample aspect ratio in Matroska, and HDR10's static metadata in Matroska and MP4. The
formats are RFC 8794 and RFC 9559 (EBML, Matroska) and ISO/IEC 14496-12 (MP4; boxes `mdcv`
and `clli`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path

from vidpipe.media.probe import ContentLight, MasteringDisplay

PADDING = "vidpipe-room-for-the-header-" + "." * 172
"""Title of the video track until `patch_matroska` uses its room."""

_SEGMENT, _TRACKS, _ENTRY, _CLUSTER = 0x18538067, 0x1654AE6B, 0xAE, 0x1F43B675
_NAME, _VIDEO, _COLOUR, _CRC, _VOID = 0x536E, 0xE0, 0x55B0, 0xBF, 0xEC
_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT = 0x54B0, 0x54BA, 0x54B2
_MAX_CLL, _MAX_FALL, _MASTERING = 0x55BC, 0x55BD, 0x55D0


def patch_matroska(
    path: Path,
    title: str | None,
    aspect: tuple[int, int, Fraction] | None,
    mastering: MasteringDisplay | None,
    light: ContentLight | None,
) -> bool:
    """Write facts of the picture into a Matroska or WebM file, in place.

    Args:
        path: a complete file whose video track bears the title `PADDING`.
        title: what the track is to be called instead, or None.
        aspect: (width, height, sample aspect ratio), or None for square samples.
        mastering, light: HDR metadata, or None.

    Returns:
        Whether there was room for them.
    """
    with path.open("r+b") as file:
        head = file.read(1 << 20)
        found = _find_tracks(head)
        if found is None:
            return False
        start, end = found
        children = [
            (key, _track(body, title, aspect, mastering, light) if _is_padded(key, body) else body)
            for key, body in _elements(head[start:end])
        ]
        body = b"".join(_element(k, v) for k, v in children if k != _CRC)
        has_crc = any(k == _CRC for k, _ in children)
        room = end - start - (6 if has_crc else 0) - len(body)
        if room < 0 or room == 1:
            return False
        body += _void(room)
        if has_crc:
            body = _element(_CRC, struct.pack("<I", zlib.crc32(body))) + body
        file.seek(start)
        file.write(body)
    return True


def _is_padded(key: int, body: bytes) -> bool:
    return key == _ENTRY and dict(_elements(body)).get(_NAME) == PADDING.encode()


def _track(
    body: bytes,
    title: str | None,
    aspect: tuple[int, int, Fraction] | None,
    mastering: MasteringDisplay | None,
    light: ContentLight | None,
) -> bytes:
    result = b""
    for key, value in _elements(body):
        if key in (_VOID, _CRC):
            continue
        if key == _NAME:
            if title is None:
                continue
            value = title.encode()
        if key == _VIDEO:
            value = _picture(value, aspect, mastering, light)
        result += _element(key, value)
    return result


def _picture(
    body: bytes,
    aspect: tuple[int, int, Fraction] | None,
    mastering: MasteringDisplay | None,
    light: ContentLight | None,
) -> bytes:
    children = [(k, v) for k, v in _elements(body) if k not in (_VOID, _CRC)]
    if aspect is not None:
        sizes = (_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT)
        children = [(k, v) for k, v in children if k not in sizes]
        width, height = display_size(*aspect)
        children += [(_DISPLAY_WIDTH, _unsigned(width)), (_DISPLAY_HEIGHT, _unsigned(height))]
    if mastering is not None or light is not None:
        colour = dict(children).get(_COLOUR, b"")
        children = [(k, v) for k, v in children if k != _COLOUR]
        if light is not None:
            colour += _element(_MAX_CLL, _unsigned(light.max_cll))
            colour += _element(_MAX_FALL, _unsigned(light.max_fall))
        if mastering is not None:
            numbers = [n for point in mastering.primaries for n in point]
            numbers += [*mastering.white, mastering.luminance[1], mastering.luminance[0]]
            inner = b"".join(
                _element(0x55D1 + i, struct.pack(">d", float(n))) for i, n in enumerate(numbers)
            )
            colour += _element(_MASTERING, inner)
        children.append((_COLOUR, colour))
    return b"".join(_element(k, v) for k, v in children)


def display_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Return the smallest display size, no smaller than the picture, of exactly its shape.

    Args:
        width, height: pixels of the picture.
        aspect: width over height of a sample.
    """
    shape = Fraction(width, height) * aspect
    times = max(ceil(Fraction(width, shape.numerator)), ceil(Fraction(height, shape.denominator)))
    return shape.numerator * times, shape.denominator * times


def _find_tracks(head: bytes) -> tuple[int, int] | None:
    """Return where the contents of the Tracks element begin and end."""
    at = 0
    while at + 12 < len(head):
        key, start, size = _header(head, at)
        if key == _CLUSTER:
            return None
        if key == _TRACKS:
            return (start, start + size) if start + size <= len(head) else None
        at = start if key == _SEGMENT else start + size
    return None


def _header(data: bytes, at: int) -> tuple[int, int, int]:
    """Read an element's id and size: (id, start of contents, size)."""
    length = 9 - data[at].bit_length()
    key = int.from_bytes(data[at : at + length], "big")
    at += length
    length = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return key, at + length, size


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        key, start, size = _header(data, at)
        yield key, data[start : start + size]
        at = start + size


def _element(key: int, body: bytes) -> bytes:
    size = len(body)
    length = 1
    while size >= (1 << 7 * length) - 1:
        length += 1
    name = key.to_bytes((key.bit_length() + 7) // 8, "big")
    return name + (size | 1 << 7 * length).to_bytes(length, "big") + body


def _void(room: int) -> bytes:
    """Return a Void element of exactly `room` bytes; 0, or at least 2."""
    if room == 0:
        return b""
    if room < 10:
        return bytes([_VOID, 0x80 | (room - 2)]) + bytes(room - 2)
    return bytes([_VOID]) + ((room - 9) | 1 << 56).to_bytes(8, "big") + bytes(room - 9)


def _unsigned(value: int) -> bytes:
    return value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big")


_NESTED = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def patch_mp4(path: Path, mastering: MasteringDisplay | None, light: ContentLight | None) -> bool:
    """Write HDR metadata into an MP4 or MOV file whose `moov` box comes last.

    Returns:
        Whether the video track was found.
    """
    with path.open("r+b") as file:
        at = 0
        end = path.stat().st_size
        while at + 8 <= end:
            file.seek(at)
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:
                (size,) = struct.unpack(">Q", file.read(8))
            if kind == b"moov":
                break
            at += max(size, 8)
        else:
            return False
        if at + size != end:
            return False
        file.seek(at)
        patched = _box_patched(file.read(size), _hdr_boxes(mastering, light))
        if patched is None:
            return False
        file.seek(at)
        file.write(patched)
    return True


def _box_patched(box: bytes, extra: bytes) -> bytes | None:
    """Return a box with `extra` in its first video sample entry; None without one."""
    kind = box[4:8]
    if kind == b"trak" and not _is_picture(box):
        return None
    if kind == b"stsd":
        (size,) = struct.unpack_from(">I", box, 16)
        entry = box[16 : 16 + size]
        entry = struct.pack(">I", size + len(extra)) + entry[4:] + extra
        return _resized(box[:16] + entry + box[16 + size :])
    if kind not in _NESTED:
        return None
    at = 8
    while at + 8 <= len(box):
        (size,) = struct.unpack_from(">I", box, at)
        inner = _box_patched(box[at : at + size], extra)
        if inner is not None:
            return _resized(box[:at] + inner + box[at + size :])
        at += max(size, 8)
    return None


def _is_picture(trak: bytes) -> bool:
    """Say whether a track is a video track with moving pictures."""
    at = trak.find(b"hdlr")
    if trak[at + 12 : at + 16] != b"vide":
        return False
    at = trak.find(b"stsd")
    return trak[at + 16 : at + 20] not in (b"jpeg", b"png ", b"bmp ")


def _resized(box: bytes) -> bytes:
    return struct.pack(">I", len(box)) + box[4:]


def _hdr_boxes(mastering: MasteringDisplay | None, light: ContentLight | None) -> bytes:
    boxes = b""
    if mastering is not None:
        red, green, blue = mastering.primaries
        points = [n for p in (green, blue, red, mastering.white) for n in p]
        low, high = mastering.luminance
        boxes += struct.pack(
            ">I4s8H2I",
            32,
            b"mdcv",
            *(round(n * 50000) for n in points),
            round(high * 10000),
            round(low * 10000),
        )
    if light is not None:
        boxes += struct.pack(">I4s2H", 12, b"clli", light.max_cll, light.max_fall)
    return boxes
