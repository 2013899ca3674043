"""MPEG-TS in RTP packets over UDP (RFC 3550, RFC 2250).

FFmpeg's own muxer for it refuses sound that is written after a later picture, which a live
output cannot avoid without holding pictures back.
"""

from __future__ import annotations

import secrets
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

from vidpipe.clock import Clock

PAYLOAD = 7 * 188
"""Bytes in a datagram: whole MPEG-TS packets, as many as an Ethernet frame holds."""

_HEADER = struct.Struct(">BBHII")
_VERSION_2 = 0x80
_MPEG_TS = 33  # payload type, RFC 3551
_TICKS_A_SECOND = 90000


class RtpWriter:
    """A file that PyAV can write MPEG-TS to.

    Args:
        url: rtp://HOST:PORT.
        clock: source of the packets' timestamps, their time of sending.

    Raises:
        OSError: the host is not known.
    """

    def __init__(self, url: str, clock: Clock) -> None:
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = found[0]
        self._address: Any = address
        self._clock = clock
        self._source = secrets.randbits(32)
        self._number = secrets.randbits(16)
        self._socket = socket.socket(family, kind)

    def write(self, data: bytes) -> int:
        """Send whole MPEG-TS packets."""
        stamp = int(self._clock.now_s() * _TICKS_A_SECOND) & 0xFFFFFFFF
        for begin in range(0, len(data), PAYLOAD):
            head = _HEADER.pack(_VERSION_2, _MPEG_TS, self._number, stamp, self._source)
            self._socket.sendto(head + bytes(data[begin : begin + PAYLOAD]), self._address)
            self._number = (self._number + 1) & 0xFFFF
        return len(data)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
