"""What a source or a network output is called, and how FFmpeg is told."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vidpipe.errors import InputError, did_you_mean

DEVICES = ("v4l2", "dshow", "avfoundation", "x11grab", "gdigrab", "lavfi")
"""Input devices of FFmpeg that can be named in an address: `v4l2:/dev/video0`."""

SCHEMES_IN = ("rtsp", "rtsps", "rtmp", "rtmps", "udp", "rtp", "http", "https", "tcp", "unix")

MUXERS = {
    "rtmp": "flv",
    "rtmps": "flv",
    "rtsp": "rtsp",
    "udp": "mpegts",
    "rtp": "mpegts",
    "tcp": "mpegts",
    "unix": "mpegts",
    "http": "mpegts",
    "https": "mpegts",
}
"""Scheme of a network output -> FFmpeg's muxer."""

# What comes while FFmpeg looks at a source is kept and given out in one go afterwards: a key
# frame is among it, and the next one may be seconds away. (So no fflags=nobuffer.)
_FIRST_LOOK = {"analyzeduration": "3000000"}

AGAIN = {"analyzeduration": "500000", "fpsprobesize": "2"}
"""Options for a source that was read before: its rate is known, so a short look will do."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a live source is.

    Attributes:
        kind: "camera", "screen", "network", "file" or "generator" (FFmpeg's lavfi).
        url: what FFmpeg opens.
        format: FFmpeg's demuxer or device, or None to let it find out.
        options: options of the demuxer and its protocol.
    """

    kind: str
    url: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def paced(self) -> bool:
        """Whether frames come in their own time, not as fast as they are asked for."""
        return self.kind not in ("file", "generator")


def parse_source(
    text: str, *, size: str | None = None, rate: float | None = None, platform: str = sys.platform
) -> Address:
    """Read the address of a live source.

    Args:
        text: "camera", "camera:1", "camera:NAME", "screen", "screen:WxH+X,Y", a URL, a device of
            FFmpeg such as "v4l2:/dev/video0", or a file.
        size: WIDTHxHEIGHT to ask a camera or screen for.
        rate: frames per second to ask a camera or screen for.
        platform: as `sys.platform`.

    Raises:
        InputError: it is none of these.
    """
    if size is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
        raise InputError(f"size is '{size}'", hint="Write WIDTHxHEIGHT, such as 1280x720")
    asked = {"video_size": size} if size else {}
    if rate is not None:
        asked["framerate"] = f"{rate:g}"
    word, colon, rest = text.partition(":")
    if word == "camera":
        return _camera(rest, asked, platform)
    if word == "screen":
        return _screen(rest, asked, platform)
    if colon and word in DEVICES:
        kind = {"lavfi": "generator", "x11grab": "screen", "gdigrab": "screen"}.get(word, "camera")
        return Address(kind, rest, word, {} if word == "lavfi" else asked)
    if "://" in text:
        scheme = urlsplit(text).scheme.lower()
        if scheme not in SCHEMES_IN:
            raise InputError(
                f"'{scheme}' is not a protocol that can be read",
                hint=did_you_mean(scheme, [*SCHEMES_IN]),
            )
        options = dict(_FIRST_LOOK)
        if scheme in ("rtsp", "rtsps"):
            options["rtsp_transport"] = "tcp"
        if scheme in ("udp", "rtp"):
            options |= {"fifo_size": "50000", "overrun_nonfatal": "1"}
        return Address("network", text, None, options)
    if not Path(text).is_file():
        raise InputError(
            f"source '{text}' is no file, URL, camera or screen",
            hint="Write camera, screen, rtsp://..., or the name of a file",
        )
    return Address("file", text)


def _camera(name: str, asked: dict[str, str], platform: str) -> Address:
    if platform == "win32":
        if not name or name.isdecimal():
            raise InputError(
                "cameras have names on Windows", hint='Write "camera:NAME", quoted if it has spaces'
            )
        return Address("camera", f"video={name}", "dshow", asked | {"rtbufsize": "64M"})
    if platform == "darwin":
        asked = {"framerate": "30", **asked}
        return Address("camera", f"{name or '0'}:none", "avfoundation", asked)
    path = f"/dev/video{name or '0'}" if not name or name.isdecimal() else name
    return Address("camera", path, "v4l2", asked)


def _screen(area: str, asked: dict[str, str], platform: str) -> Address:
    found = re.fullmatch(r"(?:(\d+x\d+))?(?:\+(\d+),(\d+))?", area)
    if found is None:
        raise InputError(
            f"screen area '{area}' is not understood", hint="Write screen:WIDTHxHEIGHT+LEFT,TOP"
        )
    size, left, top = found.groups()
    asked = {"framerate": "30", **asked}
    if size:
        asked["video_size"] = size
    if platform == "win32":
        if left is not None:
            asked |= {"offset_x": left, "offset_y": top}
        return Address("screen", "desktop", "gdigrab", asked)
    if platform == "darwin":
        return Address("screen", "Capture screen 0:none", "avfoundation", asked)
    display = os.environ.get("DISPLAY")
    if not display:
        raise InputError("there is no screen: DISPLAY is not set", hint="Start X11 or Xvfb first")
    if left is not None:
        display += f"+{left},{top}"
    return Address("screen", display, "x11grab", asked)


def muxer_for(url: str) -> str:
    """Return FFmpeg's muxer for the URL of a network output.

    Raises:
        InputError: it cannot be written to.
    """
    parts = urlsplit(url)
    muxer = MUXERS.get(parts.scheme.lower())
    if muxer is None:
        raise InputError(
            f"cannot stream to '{url}'",
            hint="Write a URL that begins with " + ", ".join(f"{s}://" for s in MUXERS),
        )
    if not parts.netloc and parts.scheme != "unix":
        raise InputError(f"'{url}' names no host", hint=f"Write {parts.scheme}://HOST:PORT/...")
    try:
        port = parts.port
    except ValueError:
        raise InputError(f"the port of '{without_secrets(url)}' is no port") from None
    if port is None and parts.scheme in ("udp", "rtp", "tcp"):
        raise InputError(f"'{url}' names no port", hint=f"Write {parts.scheme}://HOST:PORT")
    return muxer


def without_secrets(url: str) -> str:
    """Return a URL for messages: no password, and no stream key of RTMP."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    path = parts.path
    if parts.scheme.startswith("rtmp") and path.count("/") >= 2:
        path = path.rpartition("/")[0] + "/..."
    return f"{parts.scheme}://{host}{path}" if parts.scheme else url
