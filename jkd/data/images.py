"""Images of variable size on the host: decoding, the central crop, and random resized crops, by Pillow."""

import io
import math

import numpy as np
from PIL import Image

from jkd.data.seeding import random_state

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
AREA = (0.08, 1.0)  # share of the image that a random crop covers
ASPECT = (3 / 4, 4 / 3)  # width : height of a random crop
ATTEMPTS = 10
CENTRAL = 224 / 256  # the central crop is 224 of a shorter side of 256

Number = float | int
Box = tuple[Number, Number, Number, Number]


def decode(data: bytes, channels: int) -> Image.Image:
    """Decodes a JPEG or PNG into `channels` 8-bit channels (1, 3 or 4)."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert(MODES[channels])


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels, uint8[H, W, C]."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Resizes the part of `image` in `box` (left, top, right, bottom) to uint8[size, size, C], bilinear."""
    return to_array(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def central_box(width: int, height: int) -> Box:
    """The central square whose side is 224/256 of the shorter side (resize to 256, crop 224, in one step)."""
    side = min(width, height) * CENTRAL
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, seed: int, position: int) -> Box:
    """The random box of the example at `position` of the stream that `seed` began.

    Area share uniform in [.08, 1], log aspect uniform in +-log(4/3); after ten boxes that do not fit, the
    largest central one with an allowed aspect. Szegedy et al., "Going deeper with convolutions", 2015.
    """
    stream = random_state("random resized crop", seed, position)
    for _ in range(ATTEMPTS):
        area = width * height * stream.uniform(*AREA)
        aspect = math.exp(stream.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = stream.randint(width - w + 1), stream.randint(height - h + 1)
            return left, top, left + w, top + h
    side_w, side_h = min(width, height * ASPECT[1]), min(height, width / ASPECT[0])
    x, y = (width - side_w) / 2, (height - side_h) / 2
    return x, y, x + side_w, y + side_h
