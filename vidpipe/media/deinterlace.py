"""Interlaced pictures to progressive ones."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
import av.filter

from vidpipe.media.probe import fraction


class Deinterlacer:
    """bwdif in "send_frame" mode: one frame out for each frame in, same timestamps."""

    def __init__(self, picture: av.VideoFrame, time_base: Fraction, mode: str) -> None:
        self._key = (picture.width, picture.height, picture.format.name)
        self._time_base = time_base
        self._graph = av.filter.Graph()
        source = self._graph.add(
            "buffer",
            video_size=f"{picture.width}x{picture.height}",
            pix_fmt=picture.format.name,
            time_base=f"{time_base.numerator}/{time_base.denominator}",
            pixel_aspect="1/1",
            colorspace=str(int(picture.colorspace)),
            range=str(int(picture.color_range)),
        )
        which = "interlaced" if mode == "auto" else "all"
        bwdif = self._graph.add("bwdif", f"mode=send_frame:parity=auto:deint={which}")
        sink = self._graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        self._graph.configure()

    def takes(self, picture: av.VideoFrame) -> bool:
        """Say whether the graph was made for such pictures."""
        return self._key == (picture.width, picture.height, picture.format.name)

    def take(self, picture: av.VideoFrame) -> Iterator[av.VideoFrame]:
        """Take one picture, give those that are done."""
        self._graph.vpush(picture)
        yield from self._pull()

    def flush(self) -> Iterator[av.VideoFrame]:
        """Give what is held back."""
        self._graph.vpush(None)
        yield from self._pull()

    def _pull(self) -> Iterator[av.VideoFrame]:
        while True:
            try:
                picture = self._graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            # The filter counts in half ticks.
            base = fraction(picture.time_base) or self._time_base
            if picture.pts is not None:
                picture.pts = round(picture.pts * base / self._time_base)
            picture.duration = round(picture.duration * base / self._time_base)
            picture.time_base = self._time_base
            yield picture
