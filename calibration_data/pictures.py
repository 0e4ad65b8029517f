"""Pictures of any mode as upright RGB, as a viewer shows them."""

from __future__ import annotations

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # of EXIF: how a camera was held
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the EXIF standard (CIPA DC-008), tag Orientation: what undoes each; Pillow counts its angles against the clock


def upright_rgb(image: Image.Image, transparent_is_white: bool = True) -> Image.Image:
    """A new picture of mode RGB, turned as its EXIF record asks.

    16-bit greys are scaled to 8 bits, where Pillow would make all but the darkest 256 of them white.

    Args:
        image: open, of any mode.
        transparent_is_white: what is transparent lies on white paper. Off, the colour stored under it is shown, most often black.

    Raises:
        ValueError: numbers of 32 bits: nothing says which of them is white.
    """
    turn = TURNED.get(_orientation(image))
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"it holds numbers of 32 bits (mode {image.mode}), none of which is known to be white")
    elif transparent_is_white and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged record makes Pillow raise many things, and the picture can be read without it
        return 1
