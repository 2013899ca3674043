"""Real-time video enhancement: one graph of stages for files, live pictures and libraries.

    vidpipe.enhance("in.mp4", "out.mp4")                      # a file to a file
    for frame in vidpipe.stream(vidpipe.read("in.mp4")): ...  # frames to frames
    large = vidpipe.Enhancer("nano-2x")(picture)              # an array to an array

Importing this loads none of the heavy packages; they are loaded by the stages that use them.
"""

from vidpipe.api import Enhancer, enhance, read, stream
from vidpipe.errors import VidpipeError
from vidpipe.frame import Frame, FrameSpec, pixel_format
from vidpipe.graph import Graph
from vidpipe.pipeline import Pipeline, Report
from vidpipe.stage import Sink, Source, Stage, register

__all__ = [
    "Enhancer",
    "Frame",
    "FrameSpec",
    "Graph",
    "Pipeline",
    "Report",
    "Sink",
    "Source",
    "Stage",
    "VidpipeError",
    "enhance",
    "pixel_format",
    "read",
    "register",
    "stream",
]

__version__ = "0.1.0"
