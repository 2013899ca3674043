"""Frames in, frames out: python samples/enhance_frames.py in.mp4."""

import sys

import vidpipe


def main(source: str) -> None:
    """Print the mean luma of every enhanced frame, while the next ones are worked on."""
    for frame in vidpipe.stream(vidpipe.read(source), model="nano-2x"):
        luma = frame.planes[0]
        print(f"{frame.time_s:7.3f} s  {frame.spec.width}x{frame.spec.height}  {luma.mean():.1f}")


if __name__ == "__main__":
    main(sys.argv[1])
