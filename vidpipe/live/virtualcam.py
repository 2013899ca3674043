"""A camera for other programs: OBS, calls, browsers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from vidpipe.errors import MissingExtraError, OutputError
from vidpipe.frame import Frame
from vidpipe.live.outputs import LiveSink
from vidpipe.stage import register

_HINTS = {
    "linux": "Load the module first: sudo modprobe v4l2loopback exclusive_caps=1",
    "win32": "Install OBS Studio: its virtual camera is used",
    "darwin": "Install OBS Studio and start its virtual camera once",
}


@register("virtual-camera")
class VirtualCamera(LiveSink):
    """Shows the pictures as a camera, through pyvirtualcam.

    Args:
        device: name of the virtual camera, such as "/dev/video4"; by default the first free.
        rate: frames per second that the camera tells others; by default the source's, or 30.
    """

    capacity = 1

    def __init__(self, *, device: str | None = None, rate: float | None = None) -> None:
        super().__init__()
        self.device = device
        self.rate = rate
        self._camera: Any = None

    def open(self) -> None:
        """Open the camera.

        Raises:
            MissingExtraError: pyvirtualcam is not installed.
            OutputError: this machine has no virtual camera, or another program writes to it.
        """
        try:
            import pyvirtualcam
        except ImportError:
            raise MissingExtraError("pyvirtualcam", "live") from None
        assert self._spec is not None
        spec = self._spec
        native = pyvirtualcam.PixelFormat.NV12
        if spec.format.name != "nv12":
            native = pyvirtualcam.PixelFormat.I420
        try:
            self._camera = pyvirtualcam.Camera(
                spec.width,
                spec.height,
                self.rate or float(spec.rate or 30),
                fmt=native,
                device=self.device,
            )
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise OutputError(
                f"no virtual camera: {reason}", hint=_HINTS.get(sys.platform)
            ) from None

    def deliver(self, frame: Frame) -> str | None:
        """Show a frame."""
        self._camera.send(packed(frame))
        return None

    def replan(self, spec: Any) -> None:
        """Open the camera again in the new size."""
        self.close()
        self._spec = None
        self.plan(spec)
        self.open()

    def close(self) -> None:
        """Take the camera away."""
        camera, self._camera = self._camera, None
        if camera is not None:
            camera.close()

    def report(self) -> dict[str, Any]:
        """Return which camera it was."""
        return {**super().report(), "device": self.device}


def packed(frame: Frame) -> np.ndarray[Any, Any]:
    """Return the planes of a yuv420p or nv12 frame one after the other, flat uint8."""
    return np.concatenate([np.asarray(plane).ravel() for plane in frame.planes])
