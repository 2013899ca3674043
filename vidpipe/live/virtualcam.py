"""A camera for other programs: OBS, calls, browsers."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np

from vidpipe.errors import MissingExtraError, OutputError
from vidpipe.frame import Frame
from vidpipe.live.capture import Backoff
from vidpipe.live.outputs import LiveSink
from vidpipe.stage import register

_FAILURES = (RuntimeError, OSError, ValueError)
"""What pyvirtualcam raises."""

_HINTS = {
    "linux": "Load the module first: sudo modprobe v4l2loopback exclusive_caps=1",
    "win32": "Install OBS Studio: its virtual camera is used",
    "darwin": "Install OBS Studio and start its virtual camera once",
}


@register("virtual-camera")
class VirtualCamera(LiveSink):
    """Shows the pictures as a camera, through pyvirtualcam.

    A camera that is lost, or does not take a new size while another program reads it, is opened
    again and again; the filter goes on.

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
        self._backoff = Backoff()
        self._again_s = 0.0

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
        except _FAILURES as error:
            raise _no_camera(error) from None

    def deliver(self, frame: Frame) -> str | None:
        """Show a frame; when the camera is lost, note it and try again later."""
        if self._camera is None and not self._reopen():
            return self.state
        try:
            self._camera.send(packed(frame))
        except _FAILURES as error:
            self._lose(_no_camera(error))
            return self.state
        self._backoff.reset()
        return None

    def _reopen(self) -> bool:
        if self.clock.now_s() < self._again_s:
            return False
        try:
            self.open()
        except OutputError as error:
            self._lose(error)
            return False
        self.notify({"event": "sink", "sink": self.name, "state": "live"})
        return True

    def _lose(self, error: OutputError) -> None:
        if self.state != "lost":
            event = {"event": "sink", "sink": self.name, "state": "lost", "reason": error.message}
            self.notify(event)
        self.state = "lost"
        self._again_s = self.clock.now_s() + self._backoff.next()
        self.close()

    def replan(self, spec: Any) -> None:
        """Open the camera again in the new size."""
        self.close()
        self._spec = None
        self.plan(spec)
        try:
            self.open()
        except OutputError as error:
            self._lose(error)

    def close(self) -> None:
        """Take the camera away."""
        camera, self._camera = self._camera, None
        if camera is not None:
            with suppress(*_FAILURES):
                camera.close()

    def report(self) -> dict[str, Any]:
        """Return which camera it was."""
        return {**super().report(), "device": self.device}


def _no_camera(error: Exception) -> OutputError:
    reason = str(error).strip().partition("\n")[0] or "no reason given"
    return OutputError(f"no virtual camera: {reason}", hint=_HINTS.get(sys.platform))


def packed(frame: Frame) -> np.ndarray[Any, Any]:
    """Return the planes of a yuv420p or nv12 frame one after the other, flat uint8."""
    return np.concatenate([np.asarray(plane).ravel() for plane in frame.planes])
