"""A file to a file: python samples/enhance_file.py in.mp4 out.mp4."""

import sys

import vidpipe


def main(source: str, destination: str) -> None:
    """Enhance one file and print what was done."""
    report = vidpipe.enhance(source, destination, model="nano-2x", overwrite=True)
    for stage in report.stages:
        print(f"{stage.name:10} {stage.frames_in:6} in {stage.frames_out:6} out")
    print(f"{report.media_s:.2f} s of video in {report.wall_s:.2f} s, {report.outcome}")
    for problem in report.problems:
        print("problem:", problem)


if __name__ == "__main__":
    main(*sys.argv[1:3])
