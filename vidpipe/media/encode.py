"""Frames into a media file, with all that its source holds beside them."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import av.error

from vidpipe.device import CPU, Device
from vidpipe.errors import DeviceError, OutputError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.media import nvenc
from vidpipe.media.containers import CONTAINERS, Container, container_for
from vidpipe.media.decode import Decode
from vidpipe.media.encoders import (
    NVENC,
    Encoder,
    encoded_color,
    encoder_for,
    encoder_format,
    encoder_options,
)
from vidpipe.media.hdr import writes_hdr
from vidpipe.media.passthrough import Passthrough
from vidpipe.media.probe import SIDE_DATA_KINDS, MediaInfo
from vidpipe.media.verify import compare
from vidpipe.media.writer import Writer, output_error
from vidpipe.stage import Sink, Source

__all__ = ["CONTAINERS", "DROPPABLE", "Encode"]

DROPPABLE = (
    "audio",
    "subtitles",
    "data",
    "attachments",
    "covers",
    "video",
    "chapters",
    "captions",
    "alpha",
    "hdr",
    "dynamic-hdr",
    "side-data",
    "rotation",
    "metadata",
)
"""What `drop` takes, besides stream indices."""


class Encode(Sink):
    """Writes frames to a media file, and copies beside them what else the source holds.

    The file is written under a temporary name in the same folder and gets its own name
    when it is complete, so a broken run leaves nothing behind.

    Frames on a GPU that has an encoder for the codec (NVENC) are encoded there, from its
    memory. Others are copied to the host and encoded from there; the report says why.

    Args:
        path: the file to write; its suffix chooses the container.
        codec: h264, hevc, av1, vp9, ffv1, prores... or FFmpeg's name of an encoder, such as
            libx264 or h264_nvenc; by default h264, and vp9 in WebM.
        crf: constant rate factor of the encoder, NVENC's target quality; lower is better and
            bigger.
        preset: of the encoder.
        pix_fmt: pixel format to encode in; by default the link's.
        encoder_options: more options of the encoder, by FFmpeg's names.
        drop: what to leave out: kinds of streams (audio, subtitles, data, attachments,
            covers, video), chapters, captions, alpha, hdr, dynamic-hdr, side-data,
            rotation, metadata, or the index of a stream.
        overwrite: replace a file that exists.
        threads: of the encoder; 0 means as many as the machine has.
    """

    def __init__(
        self,
        *,
        path: str,
        codec: str | None = None,
        crf: float | None = None,
        preset: str | None = None,
        pix_fmt: str | None = None,
        encoder_options: dict[str, str] | None = None,
        drop: list[str] | None = None,
        overwrite: bool = False,
        threads: int = 0,
    ) -> None:
        self.path = Path(path)
        self.codec = codec
        self.crf = crf
        self.preset = preset
        self.pix_fmt = pix_fmt
        self.encoder_options = dict(encoder_options or {})
        self.drop = {str(d) for d in drop or ()}
        self.overwrite = overwrite
        self.threads = threads
        self.source: Decode | None = None
        self._container: Container = CONTAINERS[".mkv"]
        self._encoder: Encoder = encoder_for("h264")
        self._passthrough: Passthrough | None = None
        self._writer: Writer | None = None
        self._spec: FrameSpec | None = None
        self._options: dict[str, str] | None = None
        self._layout: str | None = None
        self._why_host = ""
        self._report: dict[str, Any] = {}

    def attach(self, source: Source) -> None:
        """Learn which source feeds this sink; only a `Decode` has something to copy."""
        self.source = source if isinstance(source, Decode) else None

    def device_for(self, spec: FrameSpec) -> Device:
        """Return the GPU that the frames are on where NVENC takes them, else the CPU.

        NVENC is tried with a picture of the right size.

        Raises:
            DeviceError: an encoder of the GPU is asked for by name and cannot be used.
            OutputError: there is no such encoder or container.
        """
        self._layout = None
        if spec.device == CPU:
            return CPU
        codec = self.codec or container_for(self.path).codec
        asked = encoder_for(codec)
        encoder = asked if asked.device else NVENC.get(codec)
        if encoder is None:
            self._why_host = f"{asked.name} runs there"
            return CPU
        why = self._why_not_in_place(spec)
        if not why:
            why = self._try_nvenc(encoder, spec)
            if why and asked.device:
                raise DeviceError(
                    f"encoder {asked.name} cannot be used on {spec.device}: {why}",
                    hint="Use --codec h264, hevc or av1 for whichever encoder there is",
                )
        self._why_host = f"{encoder.name} on {spec.device}: {why}" if why else ""
        return CPU if why else spec.device

    def _why_not_in_place(self, spec: FrameSpec) -> str:
        """Return why no GPU could encode such frames from its memory, or nothing."""
        video = self.source.info.video if self.source and self.source.info else None
        if video is not None and "A53_CC" in video.side_data and "captions" not in self.drop:
            return "closed captions do not go with pictures in its memory"
        hdr = video is not None and (video.mastering_display or video.content_light) is not None
        if hdr and "hdr" not in self.drop and not container_for(self.path).hdr:
            return "HDR10 metadata would be lost"
        if nvenc.layout_for(spec.format, self.pix_fmt) is None:
            return f"{self.pix_fmt or spec.format} is not taken from its memory"
        if spec.width % 2 or spec.height % 2:
            return f"{spec.width}x{spec.height} is not an even size"
        return ""

    def _try_nvenc(self, encoder: Encoder, spec: FrameSpec) -> str:
        """Choose NVENC and its options; return why that cannot be, or nothing."""
        layout = nvenc.layout_for(spec.format, self.pix_fmt)
        assert layout is not None
        try:
            options = encoder_options(encoder, self.crf, self.preset, self.encoder_options)
        except OutputError as error:
            return error.message
        options = nvenc.with_profile(encoder.name, options, layout)
        why = ""
        for variant in nvenc.variants(options, self.encoder_options):
            failure = nvenc.attempt(encoder.name, variant, spec, layout)
            if failure is None:
                self._encoder = replace(encoder, captions=False)
                self._options, self._layout = variant, layout
                return ""
            why = why or failure
        return why

    def plan(self, spec: FrameSpec) -> None:
        """Check everything that can be checked before the first frame.

        Raises:
            SpecError, OutputError: the frames, or something in the source, cannot be
                written to this file.
        """
        self._check_drop()
        self._settle(spec)
        self._check_path()
        if self.source is not None and self.source.info is not None:
            window = self.source.window() if self.source.trimmed else None
            source = self.source
            self._passthrough = Passthrough(
                self.source.info, self._container, self.drop, window, lambda: source.counts.jumps
            )
            self._check_picture(self.source.info)
        self._rehearse(spec)

    def _settle(self, spec: FrameSpec) -> None:
        """Choose the container, and the encoder unless NVENC was chosen."""
        self._container = container_for(self.path)
        if self._layout is None:
            self._encoder = encoder_for(self.codec or self._container.codec)
            self._options = None
        elif spec.format.name == self._layout:
            self.holds = nvenc.held(self._options or {})
        self._spec = spec

    def _check_drop(self) -> None:
        for word in self.drop:
            if word not in DROPPABLE and not word.isdecimal():
                raise OutputError(
                    f"'{word}' is not something to drop",
                    hint="Known: " + ", ".join(DROPPABLE) + ", or the index of a stream",
                )

    def _check_path(self) -> None:
        path, folder = self.path, self.path.parent
        if not folder.is_dir():
            raise OutputError(f"the folder '{folder}' does not exist", hint="Make it first")
        if path.is_dir():
            raise OutputError(f"'{path}' is a directory, expected the name of a file")
        if self.source is not None and path.exists() and path.samefile(self.source.path):
            raise OutputError(
                f"output '{path}' is the same file as the input", hint="Choose another name"
            )
        if path.exists() and not self.overwrite:
            raise OutputError(f"'{path}' exists already", hint="Use --overwrite to replace it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"no permission to write to the folder '{folder}'")

    def _check_picture(self, info: MediaInfo) -> None:
        """Refuse what goes with the picture and cannot be written."""
        video, name = info.video, self._container.name
        if video.rotation and not self._container.rotation:
            self._refuse("rotation", f"{name} cannot hold the picture's rotation")
        if info.chapters and not self._container.chapters:
            self._refuse("chapters", f"{name} cannot hold chapters")
        encoder = self._encoder
        hdr = video.mastering_display is not None or video.content_light is not None
        if hdr and not self._container.hdr and not writes_hdr(encoder.name):
            self._refuse(
                "hdr", f"neither {name} nor encoder {encoder.name} can hold HDR10 metadata"
            )
        for entry in video.side_data:
            kind = SIDE_DATA_KINDS.get(entry)
            if kind is not None and not (kind == "captions" and encoder.captions):
                what = {"captions": "closed captions"}.get(kind, f"side data {entry.lower()}")
                self._refuse(kind, f"encoder {encoder.name} cannot write the picture's {what}")

    def _refuse(self, kind: str, message: str) -> None:
        if kind not in self.drop:
            raise OutputError(
                message, hint=f"Use --drop {kind} to lose it, or another container or --codec"
            )

    def _rehearse(self, spec: FrameSpec) -> None:
        """Write a header to memory, so that what a muxer or encoder refuses shows now."""
        writer = self._new_writer(io.BytesIO(), spec)
        try:
            writer.start(None)
        finally:
            with suppress(av.error.FFmpegError, OutputError):
                writer.close()

    def _new_writer(self, file: Path | io.BytesIO, spec: FrameSpec) -> Writer:
        return Writer(file, **self._writing(spec))

    def _writing(self, spec: FrameSpec) -> dict[str, Any]:
        """Return what a writer is to be made with."""
        options = self._options
        if options is None:
            options = encoder_options(self._encoder, self.crf, self.preset, self.encoder_options)
        return {
            "path": self.path,
            "container": self._container,
            "encoder": self._encoder,
            "options": options,
            "pix_fmt": self._layout or encoder_format(self._encoder, spec, self.pix_fmt),
            "spec": spec,
            "source": self.source,
            "passthrough": self._passthrough,
            "drop": self.drop,
            "threads": self.threads,
        }

    def write(self, frame: Frame) -> None:
        """Encode one frame, and copy what else belongs before it.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._writer is None:
            self._writer = self._new_writer(self._part(), self._spec or frame.spec)
            self._writer.start(frame)
        self._writer.write(frame)

    def replan(self, spec: FrameSpec) -> None:
        """Go on with other frames; they are brought to the first size and format."""

    def _part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def finish(self) -> None:
        """Complete the file and give it its name.

        Raises:
            OutputError: it cannot be completed, or no frame came.
        """
        if self._writer is None:
            raise OutputError(f"no frame came, so '{self.path}' was not written")
        self._writer.finish()
        self._report = self._writer.report()
        part = self._part()
        if self.source is not None and self.source.info is not None:
            self._report |= compare(
                part,
                self._container,
                self.source.info,
                self._report,
                whole=self.source.read_whole(),
            )
            if "metadata" in self.drop:
                self._report["lost"] = []
        try:
            if not self.overwrite and self.path.exists():
                raise OutputError(
                    f"'{self.path}' appeared meanwhile", hint="Use --overwrite to replace it"
                )
            self._report["size"] = part.stat().st_size
            os.replace(part, self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._writer = None

    def close(self) -> None:
        """Let go of everything; an unfinished file is deleted."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(av.error.FFmpegError, OutputError):
                writer.close()
            self._part().unlink(missing_ok=True)

    def report(self) -> dict[str, Any]:
        """Return what was written, stream by stream."""
        facts = self._report
        if not facts:
            return {}
        options = " ".join(f"{k}={v}" for k, v in facts["encoder_options"].items())
        kept = [
            f"{s['kind']} {s['codec']}{'' if s['action'] == 'copy' else ' (' + s['action'] + ')'}"
            for s in facts["streams"]
        ]
        summary = f"{facts['encoder']} {options}".strip()
        lost = ", ".join(facts.get("lost", []))
        notes = [f"{self._container.name} does not keep {lost}"] if lost else []
        if self._why_host:
            notes.append(f"'{self.path}' was encoded from host memory: {self._why_host}")
        if (
            self._spec is not None
            and encoded_color(self._spec, facts["pixel_format"]).matrix != self._spec.color.matrix
        ):
            notes.append(
                f"the picture is {self._spec.format}; it was encoded as {facts['pixel_format']}, "
                "which rounds its colours"
            )
        if facts.get("start_shift_s"):
            notes.append(
                f"all streams begin {facts['start_shift_s']:.3f} s later than in the source"
            )
        if facts["resized_frames"]:
            notes.append(
                f"{facts['resized_frames']} frames were brought to the first size, "
                f"{facts['width']}x{facts['height']}"
            )
        facts = {
            **facts,
            "encoded_from": str(self._spec.device) if self._spec and self._layout else "cpu",
        }
        return {"summary": "; ".join([summary, *kept]), "notes": notes, **facts}
