"""A real RTSP server, GStreamer's, for tests: rtsp_server.py PORT CLIP RECORDING.

/play gives the clip, /record writes what is sent to it. Run by the system's Python, which has
GStreamer's bindings (see .ci/packages).
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

PLAY = (
    "( filesrc location={} ! matroskademux name=d "
    "d.video_0 ! queue ! rtph264pay name=pay0 pt=96 config-interval=1 "
    "d.audio_0 ! queue ! audioconvert ! rtpL16pay name=pay1 pt=97 )"
)
RECORD = (
    "( rtph264depay name=depay0 ! h264parse ! matroskamux name=m ! filesink location={} "
    "rtpopusdepay name=depay1 ! opusparse ! m. )"
)


def main() -> None:
    """Serve until killed."""
    port, clip, recording = sys.argv[1:]
    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
    play, record = GstRtspServer.RTSPMediaFactory(), GstRtspServer.RTSPMediaFactory()
    play.set_launch(PLAY.format(clip))
    record.set_launch(RECORD.format(recording))
    record.set_transport_mode(GstRtspServer.RTSPTransportMode.RECORD)
    server.get_mount_points().add_factory("/play", play)
    server.get_mount_points().add_factory("/record", record)
    if not server.attach(None):
        sys.exit(f"port {port} is in use")
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
