"""A stage of one's own: python samples/custom_stage.py in.mp4 out.mp4."""

import sys
from collections.abc import Iterable

import numpy as np

import vidpipe


@vidpipe.register("mirror")
class Mirror(vidpipe.Stage):
    """Flips the picture left to right."""

    def plan(self, spec: vidpipe.FrameSpec) -> vidpipe.FrameSpec:
        """Size and format stay as they are."""
        return spec

    def process(self, frame: vidpipe.Frame) -> Iterable[vidpipe.Frame]:
        """Planes are (height, width), or (height, width, 2) for interleaved chroma."""
        planes = [np.ascontiguousarray(plane[:, ::-1]) for plane in frame.planes]
        yield frame.replace(planes, frame.spec)


def main(source: str, destination: str) -> None:
    """Mirror a file."""
    graph = vidpipe.Graph("mirrored")
    graph.add("source", "decode", path=source)
    graph.add("mirror", "mirror", "source")
    graph.add("sink", "encode", "mirror", path=destination, overwrite=True)
    report = vidpipe.Pipeline(graph).run()
    print(f"{report.stage('mirror').frames_out} frames mirrored")


if __name__ == "__main__":
    main(*sys.argv[1:3])
