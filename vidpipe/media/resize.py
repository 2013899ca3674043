"""A resampler on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vidpipe.errors import SpecError
from vidpipe.frame import Frame, FrameSpec
from vidpipe.media.convert import Converter, frame_from, kernel_flags, planes_of
from vidpipe.stage import Stage


class Resize(Stage):
    """Brings frames to another size; format, colour and chroma site stay.

    Args:
        width, height: size in pixels; with one of them the other follows the shape.
        scale: factor on both sides, instead of a size.
        kernel: lanczos, bicubic, spline, bilinear, area or nearest.
        threads: of the resampler; 0 means as many as the machine has.
    """

    def __init__(
        self,
        *,
        width: int | None = None,
        height: int | None = None,
        scale: float | None = None,
        kernel: str = "lanczos",
        threads: int = 0,
    ) -> None:
        if (scale is None) == (width is None and height is None):
            raise SpecError("resize needs either a scale or a width, a height or both")
        for name, value in (("width", width), ("height", height), ("scale", scale)):
            if value is not None and value <= 0:
                raise SpecError(f"resize got {name} {value}", hint="Expected more than 0")
        kernel_flags(kernel)
        self.width = width
        self.height = height
        self.scale = scale
        self.kernel = kernel
        self.threads = threads
        self._spec: FrameSpec | None = None
        self._converter: Converter | None = None

    def plan(self, spec: FrameSpec) -> FrameSpec:
        """Return the spec in the new size.

        Raises:
            SpecError: the frames are not in host memory.
        """
        if spec.device.kind != "cpu":
            raise SpecError(
                f"resize works on the CPU, but the frames are on {spec.device}",
                hint="Let a model stage change the size, or use --device cpu",
            )
        width, height = self._size(spec)
        self._spec = replace(spec, width=width, height=height)
        return self._spec

    def _size(self, spec: FrameSpec) -> tuple[int, int]:
        if self.scale is not None:
            width, height = spec.width * self.scale, spec.height * self.scale
        elif self.width is None:
            assert self.height is not None
            width, height = spec.width * self.height / spec.height, float(self.height)
        elif self.height is None:
            width, height = float(self.width), spec.height * self.width / spec.width
        else:
            width, height = float(self.width), float(self.height)
        return max(1, round(width)), max(1, round(height))

    def open(self) -> None:
        """Make the resampler."""
        assert self._spec is not None
        self._converter = Converter(
            self._spec.width, self._spec.height, self._spec.format.name, self.kernel, self.threads
        )

    def process(self, frame: Frame) -> Iterable[Frame]:
        """Resize one frame."""
        assert self._spec is not None
        assert self._converter is not None
        if (frame.spec.width, frame.spec.height) == (self._spec.width, self._spec.height):
            yield frame.replace(frame.planes, self._spec, slot=frame.slot)
            return
        picture = frame_from(frame.planes, frame.spec.format)
        resized = self._converter(picture, frame.spec.resolved_color())
        yield frame.replace(planes_of(resized, self._spec.format), self._spec)

    def close(self) -> None:
        """Let go of the resampler."""
        self._converter = None
