import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from jkd import data
from jkd.data.policies import OPERATIONS, POLICIES
from jkd.errors import UserError

KEY = jax.random.key(0)
HEIGHT, WIDTH = 20, 24
many = jax.jit(data.apply_operations)
rand = jax.jit(data.rand_augment, static_argnums=(2, 3))
auto = jax.jit(data.auto_augment, static_argnames="policy")


def apply(images, name, strength):
    return np.asarray(many(images, np.full(len(images), OPERATIONS.index(name)), np.full(len(images), strength)))


@pytest.fixture(scope="module")
def images():
    """Eight times four: a smooth picture, one of all values, a dark one, one of a single color."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = [5 * x + 2 * y, 200 - 3 * x + y * x // 9, 40 + 3 * y]
    ramp = np.stack(channels, -1)
    noise = np.random.default_rng(0).integers(0, 256, ramp.shape)
    dark = np.random.default_rng(1).integers(30, 90, ramp.shape)
    found = np.stack([ramp, noise, dark, np.full_like(ramp, 77)])
    return np.tile(np.clip(found, 0, 255), (8, 1, 1, 1)).astype(np.uint8)


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(128,) * 3)


def pillow(name, s):
    shift = int(s * 150 / 331 * WIDTH), int(s * 150 / 331 * HEIGHT)
    return {
        "identity": lambda image: image,
        "shear_x": affine(1, 0.3 * s, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, 0.3 * s, 1, 0),
        "translate_x": affine(1, 0, shift[0], 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, shift[1]),
        "rotate": lambda image: image.rotate(30 * s, fillcolor=(128,) * 3),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
        "color": lambda image: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
        "posterize": lambda image: ImageOps.posterize(image, 8 - round(4 * abs(s))),
        "solarize": lambda image: ImageOps.solarize(image, 256 * (1 - abs(s))),
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
    }[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_that_of_pillow(name, images):
    for strength in (0.7, -0.37):
        expected = [np.asarray(pillow(name, strength)(Image.fromarray(image))) for image in images[:4]]
        found = apply(images, name, strength)[:4]
        difference = np.abs(found.astype(np.int32) - np.stack(expected).astype(np.int32))
        if name in ("rotate", "shear_x", "shear_y"):  # Pillow warps in fixed point: borders between pixels may move
            assert (difference > 0).mean() < 0.01
        else:
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.02
    assert name == "identity" or (found != images[:4]).any()


def test_strength_zero_changes_nothing(images):
    for name in OPERATIONS[:12]:
        np.testing.assert_array_equal(apply(images, name, 0.0), images)


def test_each_image_has_operations_of_its_own(images):
    same = np.repeat(images[1:2], 32, 0)
    for augment in (rand, auto):
        found = np.asarray(augment(KEY, same))
        assert len(np.unique(found.reshape(32, -1), axis=0)) > 10
        np.testing.assert_array_equal(augment(KEY, same), found)
        assert (np.asarray(augment(jax.random.key(1), same)) != found).any()


def test_a_single_operation_is_one_of_fourteen(images):
    same = np.repeat(images[1:2], 32, 0)
    known = {bytes(apply(same, name, s)[0]) for name in OPERATIONS[:-1] for s in (1.0, -1.0)}
    drawn = {bytes(image) for image in np.asarray(rand(KEY, same, 1, 30))}
    assert drawn <= known
    assert len(drawn) > 8
    np.testing.assert_array_equal(rand(KEY, images, 0), images)


def test_policies_are_complete():
    for pairs in POLICIES.values():
        assert len(pairs) == 25
        for name, probability, level in (operation for pair in pairs for operation in pair):
            assert name in OPERATIONS
            assert 0 <= probability <= 1
            assert 0 <= level <= 9


def test_one_channel(images):
    gray = images[..., :1]
    found = np.asarray(auto(KEY, gray, policy="imagenet"))
    assert (found.shape, found.dtype) == (gray.shape, np.uint8)
    assert (found != gray).any()


def test_eight_devices_equal_one(images):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(auto(KEY, placed), auto(KEY, images))


def test_mistakes(images):
    images, two = jax.device_put((images, images[..., :2]))
    with pytest.raises(UserError, match="num_operations must be >= 0 and magnitude in"):
        data.rand_augment(KEY, images, 2, 31)
    with pytest.raises(UserError, match="Unknown policy 'cifar'. Did you mean 'cifar10'"):
        data.auto_augment(KEY, images, "cifar")
    with pytest.raises(UserError, match=r"images must be uint8 .*\(augment before normalizing\), got uint8 \[32, 20"):
        data.rand_augment(KEY, two)
