"""Rotations, random crops and changes of color, against scipy, ramps and numbers worked out by hand."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import ndimage

from jkd import data
from jkd.errors import UserError

KEY, SIDE = jax.random.key(0), 8
AUGMENTATIONS = {
    "rotation": functools.partial(data.random_rotation, degrees=20.0),
    "crop": functools.partial(data.random_resized_crop, size=SIDE, area=0.2),
    "jitter": functools.partial(data.color_jitter, strength=0.4),
}


@pytest.fixture(scope="module")
def images():
    return jax.device_put(np.random.RandomState(0).randint(1, 256, (16, SIDE, SIDE, 3)).astype(np.uint8))


def test_jit_and_eight_devices_equal_eager(images):
    augment = data.compose(*AUGMENTATIONS.values())
    compiled = jax.jit(augment)
    expected = compiled(KEY, images)
    assert (expected.dtype, expected.shape) == (images.dtype, images.shape)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = compiled(KEY, jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))))
    for other in (split, augment(KEY, images)):
        # Sums in another order may round a byte to its neighbor.
        assert np.abs(np.asarray(other, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_image_has_a_draw_of_its_own(name, images):
    augment = jax.jit(AUGMENTATIONS[name])
    moved = augment(KEY, np.broadcast_to(np.asarray(images)[:1], images.shape))
    assert len(np.unique(np.asarray(moved).reshape(16, -1), axis=0)) == 16
    assert (np.asarray(augment(jax.random.key(1), images)) != np.asarray(augment(KEY, images))).any()


def test_rotations_equal_those_of_scipy(images):
    images, angles = np.asarray(images)[:8], np.array([0.0, 90, 180, -90, 13, -20, 45, 3])
    turned = np.asarray(jax.jit(data.rotated)(images.astype(np.float32), np.deg2rad(angles)))
    np.testing.assert_allclose(turned[0], images[0], atol=1e-3)
    np.testing.assert_allclose(turned[1], np.rot90(images[1]), atol=1e-2)
    inside = (slice(2, -2), slice(2, -2))  # scipy has another idea of what lies within half a pixel of the edge
    for image, angle, found in zip(images, angles, turned, strict=True):
        expected = ndimage.rotate(image.astype(np.float32), angle, axes=(1, 0), reshape=False, order=1)
        np.testing.assert_allclose(found[inside], expected[inside], atol=0.05)


def test_corners_that_turn_in_from_outside_are_zero():
    turned = jax.jit(data.rotated)(np.full((1, SIDE, SIDE, 1), 200, np.uint8), np.deg2rad(np.array([45.0])))
    turned = np.asarray(turned)
    assert turned[0, 0, 0, 0] == 0
    assert (turned[0, 3:5, 3:5] == 200).all()


@pytest.mark.parametrize("area", [0.3, 1.0])
def test_crops_keep_their_share_of_the_area(area):
    # Ramps: what a crop shows of them tells its box.
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32), (64, 32, 32))
    images = np.stack([ramp.swapaxes(1, 2), ramp], axis=-1)
    crops = np.asarray(jax.jit(data.random_resized_crop, static_argnums=(2, 3))(KEY, images, 64, area))
    assert crops.shape == (64, 64, 64, 2)
    middle = crops[:, 20:44, 20:44]
    height, width = (64 * np.diff(middle[..., i], axis=1 + i).mean((1, 2)) for i in range(2))
    share = height * width / 32**2
    # Boxes that would be larger than the image are cut to it: 1 / sqrt(4/3) of it at least.
    assert ((share > min(area, 0.86) - 0.01) & (share < 1.001)).all()
    assert (np.abs(np.log(width / height)) < np.log(4 / 3) + 0.01).all()
    assert np.ptp(crops[:, 32, 32, 0]) > (4 if area < 1 else 0)


def test_resizing_is_bilinear_with_half_pixel_centers():
    small = np.array([[0, 40], [80, 120]], np.uint8)[None, :, :, None]
    large, same = map(np.asarray, jax.jit(lambda x: (data.resize(x, 4), data.resize(x, 2)))(small))
    np.testing.assert_array_equal(large[0, 0, :, 0], [0, 10, 30, 40])
    np.testing.assert_array_equal(large[0, :, 0, 0], [0, 20, 60, 80])
    np.testing.assert_array_equal(same, small)


def test_color_jitter_by_hand(monkeypatch):
    factors = np.array([1.5, 0.5, 2], np.float32).reshape(3, 1, 1, 1, 1)
    monkeypatch.setattr(jax.random, "uniform", lambda *args, **named: factors)
    image = np.array([[100, 40, 20], [200, 0, 0]], np.uint8).reshape(1, 1, 2, 3)
    colored, one = jax.jit(lambda x: [data.color_jitter(KEY, part, 1.0) for part in (x, x[..., :1])])(image)
    # Brighter: (150, 60, 30) and (255, 0, 0); greys 83.49 and 76.245, of mean 79.8675.
    bright = np.array([[150, 60, 30], [255, 0, 0]])
    flat = 0.5 * bright + 0.5 * 79.8675
    grey = flat @ [0.299, 0.587, 0.114]
    expected = np.clip(2 * flat - grey[:, None], 0, 255)
    np.testing.assert_array_equal(np.asarray(colored)[0, 0], np.round(expected))
    np.testing.assert_array_equal(
        np.asarray(one)[0, 0, :, 0], [round(0.5 * 150 + 0.5 * 202.5), round(0.5 * 255 + 0.5 * 202.5)]
    )


def test_nothing_to_do_is_the_identity(images):
    for augment in (
        functools.partial(data.random_rotation, degrees=0.0),
        functools.partial(data.color_jitter, strength=0.0),
        lambda key, x: data.resize(x, SIDE),
    ):
        np.testing.assert_array_equal(augment(KEY, images), images)


def test_errors(images):
    with pytest.raises(UserError, match=r"degrees must be >= 0, got -1"):
        data.random_rotation(KEY, images, -1.0)
    with pytest.raises(UserError, match=r"size must be >= 1 pixels, got 0"):
        data.random_resized_crop(KEY, images, 0)
    with pytest.raises(UserError, match="area"):
        data.random_resized_crop(KEY, images, 8, 1.5)
    with pytest.raises(UserError, match="strength"):
        data.color_jitter(KEY, images, 1.5)
    with pytest.raises(UserError, match=r"images of 1 or 3 channels, got 2"):
        data.color_jitter(KEY, images[..., :2], 0.5)
