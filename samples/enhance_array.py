"""An array in, an array of the same kind out: python samples/enhance_array.py."""

import numpy as np

import vidpipe


def main() -> None:
    """Double a picture of 8-bit RGB and a picture of floats with the same enhancer."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], ramp[None, ::-1]), axis=2)
    with vidpipe.Enhancer("nano-2x") as enhancer:
        large = enhancer(picture)
        print(picture.shape, picture.dtype, "->", large.shape, large.dtype)
        floats = np.moveaxis(picture, 2, 0).astype(np.float32) / 255
        large = enhancer(floats)
        print(floats.shape, floats.dtype, "->", large.shape, large.dtype)


if __name__ == "__main__":
    main()
