import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jkd.data import images


def encoded(pixels, image_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


@pytest.mark.parametrize(("stored", "channels"), [((4, 5), 1), ((4, 5), 3), ((4, 5, 3), 3), ((4, 5, 4), 3)])
def test_decode_gives_the_channels_asked_for(stored, channels):
    pixels = np.random.RandomState(0).randint(0, 256, stored).astype(np.uint8)
    out = images.to_array(images.decode(encoded(pixels), channels))
    assert out.shape == (4, 5, channels)
    expected = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))


def test_central_box_is_resize_256_crop_224():
    assert images.central_box(256, 256) == (16, 16, 240, 240)
    assert images.central_box(512, 256) == (144, 16, 368, 240)


def test_central_crop_of_an_unscaled_image_moves_no_pixel():
    pixels = np.random.RandomState(0).randint(0, 256, (256, 300, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    out = images.crop(image, images.central_box(*image.size), 224)
    np.testing.assert_array_equal(out, pixels[16:240, 38:262])


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**63), st.integers(0, 2**40))
def test_random_box_lies_inside_and_is_keyed(width, height, seed, position):
    box = images.random_box(width, height, seed, position)
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert box == images.random_box(width, height, seed, position)


def test_random_boxes_have_the_documented_area_and_aspect():
    boxes = np.array([images.random_box(1000, 1000, 0, i) for i in range(400)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    area = width * height / 1e6
    assert len({tuple(box) for box in boxes}) > 390
    assert 0.079 < area.min() < 0.12
    # Boxes of more than 3/4 of the area may not fit at extreme aspects: a little under the mean of [.08, 1].
    assert 0.45 < area.mean() < 0.55
    assert (width / height).min() > 0.745
    assert (width / height).max() < 1.345


def test_a_strip_falls_back_to_its_center():
    # No box of aspect <= 4/3 and area >= 8 % fits into 1000 x 10.
    left, top, right, bottom = images.random_box(1000, 10, 0, 0)
    assert (top, bottom) == (0, 10)
    assert right - left == pytest.approx(10 * 4 / 3)
    assert left + right == pytest.approx(1000)
