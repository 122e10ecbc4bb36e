import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jkd import data
from jkd.errors import UserError

BATCH, HEIGHT, WIDTH, CHANNELS = 16, 8, 6, 3
KEY = jax.random.key(0)
mixup, cutmix = jax.jit(data.mixup), jax.jit(data.cutmix)
cutmix_share = jax.jit(data.cutmix_share, static_argnums=0)


@pytest.fixture(scope="module")
def images():
    # Never 0, so that what is filled in can be told from what was there.
    pixels = np.random.RandomState(0).randint(1, 256, (BATCH, HEIGHT, WIDTH, CHANNELS))
    return jax.device_put(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def bank(images):
    return jax.device_put(data.rotation_bank(np.asarray(images), [-20, 0, 20]))


AUGMENTATIONS = {
    "pad_crop": functools.partial(data.pad_crop, padding=2),
    "reflect": functools.partial(data.pad_crop, padding=2, mode="reflect"),
    "shift": functools.partial(data.shift, max_shift=3),
    "flip": data.flip,
    "cutout": functools.partial(data.cutout, size=4),
    "cutout_shared": functools.partial(data.cutout, size=4, per_example=False),
}
COMPOSED = data.compose(*(AUGMENTATIONS[name] for name in ("pad_crop", "flip", "cutout")))
named = pytest.mark.parametrize("name", AUGMENTATIONS)


def test_jit_vmap_and_eight_devices_equal_eager(images):
    augment = COMPOSED
    expected = augment(KEY, images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    for placed in (images, jax.device_put(images, rows)):
        np.testing.assert_array_equal(jax.jit(augment)(KEY, placed), expected)
    keys = jax.random.split(KEY, 2)
    both = np.asarray(jax.jit(jax.vmap(augment, in_axes=(0, None)))(keys, images))
    for key, one in zip(keys, both, strict=True):
        np.testing.assert_array_equal(one, augment(key, images))
    assert (both[0] != both[1]).any()


@named
def test_floats_move_like_bytes(name, images):
    augment = AUGMENTATIONS[name]
    expected, moved = augment(KEY, images), augment(KEY, images.astype(jnp.float32))
    assert expected.shape == moved.shape == images.shape
    assert (expected.dtype, moved.dtype) == (jnp.uint8, jnp.float32)
    np.testing.assert_array_equal(moved, expected)
    assert (np.asarray(expected) != np.asarray(images)).any()


def shifted(image, down, right):
    """An image moved by whole pixels with zeros coming in: pixel by pixel."""
    out = np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            if 0 <= y - down < image.shape[0] and 0 <= x - right < image.shape[1]:
                out[y, x] = image[y - down, x - right]
    return out


@pytest.mark.parametrize("augment", [data.shift, data.pad_crop])
def test_shift_is_one_of_the_whole_pixel_moves(augment, images):
    found = []
    for image, moved in zip(np.asarray(images), np.asarray(augment(KEY, images, 2)), strict=True):
        moves = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if (shifted(image, y, x) == moved).all()]
        assert len(moves) == 1
        found += moves
    rows, columns = zip(*found, strict=True)
    assert set(rows) == set(columns) == {-2, -1, 0, 1, 2}
    assert len(set(found)) > 8


def test_reflected_edges(images):
    expected = np.pad(np.asarray(images), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    cropped = np.asarray(data.pad_crop(KEY, images, 1, mode="reflect"))
    for padded, out in zip(expected, cropped, strict=True):
        windows = [padded[y : y + HEIGHT, x : x + WIDTH] for y in range(3) for x in range(3)]
        assert any((window == out).all() for window in windows)
    assert (cropped > 0).all()


def test_nothing_to_do_is_the_identity(images):
    for same in (
        data.shift(KEY, images, 0),
        data.pad_crop(KEY, images, 0),
        data.flip(KEY, images, 0.0),
        data.flip(KEY, data.flip(KEY, images, 1.0), 1.0),
        data.cutout(KEY, images, 0),
        data.compose()(KEY, images),
        jax.jit(lambda x: data.cutmix(x, jnp.arange(BATCH)[::-1], 1.0, (3, 3)))(images),
    ):
        np.testing.assert_array_equal(same, images)


def test_flip_mirrors_some_images(images):
    flipped = np.asarray(data.flip(KEY, images))
    mirrored = np.asarray(images)[:, :, ::-1]
    chosen = (flipped == mirrored).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(flipped[~chosen], np.asarray(images)[~chosen])
    assert 0 < chosen.sum() < BATCH
    np.testing.assert_array_equal(data.flip(KEY, images, 1.0), mirrored)


@given(st.integers(0, 2**31), st.sampled_from([3, 4]))
def test_cutout_removes_one_clipped_square(seed, size):
    ones = jnp.ones((BATCH, HEIGHT, WIDTH, 1), jnp.uint8)
    gone = np.asarray(data.cutout(jax.random.key(seed), ones, size))[..., 0] == 0
    rows, columns = gone.any(axis=2).sum(axis=1), gone.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(gone.sum(axis=(1, 2)), rows * columns)
    # A center pixel is inside: at least the half that is not clipped is there.
    assert (rows >= (size + 1) // 2).all()
    assert (rows <= size).all()
    assert (columns >= (size + 1) // 2).all()
    assert (columns <= size).all()


def test_cutout_places(images):
    def boxes(**kwargs):
        return np.unique(np.asarray(data.cutout(KEY, images, 3, **kwargs)) == 0, axis=0)

    assert len(boxes(per_example=False)) == 1
    assert len(boxes()) > 3


def test_normalize_by_hand():
    pixels = np.array([[[[0, 255], [51, 102]]]], np.uint8)
    out, plain = jax.jit(lambda x: (data.normalize(x, [0.5, 0.2], [0.5, 0.1]), data.normalize(x, 0, 1)))(pixels)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [[[[-1, 8], [-0.6, 2]]]], atol=1e-6)
    np.testing.assert_allclose(plain, pixels / 255, atol=1e-7)


def test_rotation_bank_by_hand():
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    turned = data.rotation_bank(image, [0, 90, 180])
    assert turned.shape == (3, 1, 3, 3, 1)
    assert turned.dtype == np.uint8
    np.testing.assert_array_equal(turned[0], image)
    np.testing.assert_array_equal(turned[1, 0, ..., 0], np.rot90(image[0, ..., 0]))  # counter-clockwise
    np.testing.assert_array_equal(turned[2, 0, ..., 0], np.rot90(image[0, ..., 0], 2))


def test_rotate_gathers_each_example_at_some_angle(bank):
    index = jax.device_put(np.array([3, 0, 15, 3, 7, 7, 7, 9], np.int32))
    out = data.rotate(KEY, bank, index)
    np.testing.assert_array_equal(jax.jit(data.rotate)(KEY, bank, index), out)
    bank, out, index = np.asarray(bank), np.asarray(out), np.asarray(index)
    angles = []
    for image, row in zip(out, index, strict=True):
        matches = [a for a in range(3) if (bank[a, row] == image).all()]
        assert len(matches) == 1
        angles += matches
    assert len(set(angles)) > 1


@given(st.floats(0, 1))
def test_mixup_is_the_weighted_mean(lam):
    x = np.array([1, 2, 4], np.float32).reshape(3, 1, 1, 1)
    permutation = np.array([2, 0, 1])
    expected = lam * np.array([1, 2, 4]) + (1 - lam) * np.array([4, 1, 2])
    np.testing.assert_allclose(np.ravel(mixup(x, permutation, lam)), expected, rtol=1e-5)
    per_example = mixup(x, permutation, np.array([1.0, lam, 0.0]))
    np.testing.assert_allclose(np.ravel(per_example), [1, expected[1], 2], rtol=1e-5)


def test_mixup_keeps_the_dtype_and_refuses_bytes(images):
    permutation = np.arange(BATCH)
    low = np.asarray(images).astype(jnp.bfloat16)
    assert mixup(low, permutation, np.float32(0.3)).dtype == jnp.bfloat16
    with pytest.raises(UserError, match="mixup needs float images .* got uint8"):
        mixup(images, permutation, 0.5)


ZERO_AND_ONE = np.stack([np.zeros((8, 8, 1), np.float32), np.ones((8, 8, 1), np.float32)])


def test_cutmix_box_by_hand():
    # W = 8, lambda = .75, center (1, 6): s = 4, x in [-1, 3) clipped to 0..3, y in [4, 8): 3 * 4 / 64.
    mixed = np.asarray(cutmix(ZERO_AND_ONE, np.array([1, 0]), 0.75, np.array([1, 6])))
    expected = np.zeros((8, 8))
    expected[4:8, 0:3] = 1
    np.testing.assert_array_equal(mixed[0, ..., 0], expected)
    np.testing.assert_array_equal(mixed[1, ..., 0], 1 - expected)
    assert jax.jit(lambda: data.cutmix_share((8, 8), 0.75, (1, 6)))().tolist() == [0.1875]


@pytest.mark.parametrize(("side", "pasted"), [(1, 0), (2, 2), (3, 2), (5, 4), (8, 8)])
def test_cutmix_box_of_an_odd_side_is_a_pixel_smaller(side, pasted):
    # [c - h, c + h) with h = side // 2, as in its authors' code.
    lam = 1 - (side / 8) ** 2
    mixed = np.asarray(cutmix(ZERO_AND_ONE, np.array([1, 0]), lam, np.array([4, 4])))
    expected = np.zeros((8, 8))
    expected[4 - pasted // 2 : 4 + pasted // 2, 4 - pasted // 2 : 4 + pasted // 2] = 1
    np.testing.assert_array_equal(mixed[0, ..., 0], expected)


def test_a_nan_weight_shows(images):
    floats, order = np.asarray(images, np.float32), np.arange(BATCH)
    assert np.isnan(cutmix(floats, order, np.nan, np.array([3, 3]))).all()
    assert np.isnan(mixup(floats, order, np.nan)).all()
    assert np.isnan(cutmix_share((8, 6), np.nan, np.array([3, 3]))).all()


def test_cutmix_side_is_not_lost_to_rounding():
    # 10 * sqrt(1 - .36) = 8, and 20 * sqrt(1 - .51) = 14: a little less in float32.
    np.testing.assert_allclose(cutmix_share((10, 20), 0.36, np.array([10, 5])), [8 * 16 / 200])
    np.testing.assert_allclose(cutmix_share((20, 20), 0.51, np.array([10, 10])), [14 * 14 / 400])


@functools.partial(jax.jit, static_argnums=1)
def draw_boxes(key, per_example):
    return data.draw_cutmix(key, BATCH, (8, 6), per_example=per_example)


@given(st.integers(0, 2**31), st.booleans())
def test_cutmix_moves_pixels_and_reports_their_share(seed, per_example):
    pixels = np.broadcast_to(np.arange(BATCH, dtype=np.uint8)[:, None, None, None], (BATCH, 8, 6, 1))
    draw = draw_boxes(jax.random.key(seed), per_example)
    assert draw.lam.shape == ((BATCH,) if per_example else ())
    assert draw.center.shape == ((BATCH, 2) if per_example else (2,))
    mixed = np.asarray(cutmix(pixels, *draw))[..., 0]
    own, partner = np.arange(BATCH)[:, None, None], np.asarray(draw.permutation)[:, None, None]
    assert ((mixed == own) | (mixed == partner)).all()
    pasted = (mixed == partner).mean(axis=(1, 2))
    share = np.broadcast_to(cutmix_share((8, 6), draw.lam, draw.center), (BATCH,))
    other = np.asarray(draw.permutation) != np.arange(BATCH)
    np.testing.assert_allclose(pasted[other], share[other], atol=1e-6)
    # Clipping only makes a box smaller.
    assert (share <= 1 - np.asarray(draw.lam) + 1e-3).all()
    if not per_example:
        np.testing.assert_array_equal(np.sort(mixed, axis=0), pixels[..., 0])


@pytest.fixture(scope="module")
def draw():
    return jax.tree.map(np.asarray, data.draw_cutmix(KEY, 512, (3, 7), alpha=0.2, per_example=True))


def test_drawn_centers_cover_the_image_and_nothing_else(draw):
    assert set(draw.center[:, 0].tolist()) == set(range(7))
    assert set(draw.center[:, 1].tolist()) == set(range(3))


def test_drawn_weights_follow_beta(draw):
    assert sorted(draw.permutation.tolist()) == list(range(512))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)) = .1786; the mean of 512 draws is within .019 (1 s.d.).
    assert abs(draw.lam.mean() - 0.5) < 0.06
    assert abs(draw.lam.var() - 0.25 / 1.4) < 0.02
    uniform = np.asarray(data.draw_cutmix(KEY, 512, (3, 7), per_example=True).lam)
    assert abs(uniform.var() - 1 / 12) < 0.02


def test_mixing_on_eight_devices(images):
    draw = draw_boxes(KEY, True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    expected = cutmix(images, *draw)
    assert expected.dtype == images.dtype
    assert (np.asarray(expected) != np.asarray(images)).any()
    np.testing.assert_array_equal(cutmix(jax.device_put(images, rows), *draw), expected)


def test_errors(images):
    with pytest.raises(UserError, match="Unknown mode 'wrap'"):
        data.pad_crop(KEY, images, mode="wrap")
    with pytest.raises(UserError, match="padding must be in .*got 6 for 8x6"):
        data.pad_crop(KEY, images, 6, mode="reflect")
    with pytest.raises(UserError, match="padding must be in"):
        data.pad_crop(KEY, images, -1)
    with pytest.raises(UserError, match="max_shift must be >= 0, got -1"):
        data.shift(KEY, images, -1)
    with pytest.raises(UserError, match="size must be >= 0, got -2"):
        data.cutout(KEY, images, -2)
    for alpha in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"alpha must be positive and finite, got {alpha}"):
            data.draw_cutmix(KEY, 4, (8, 8), alpha)
        with pytest.raises(UserError, match="alpha must be positive and finite"):
            data.draw_mixup(KEY, 4, alpha)
    with pytest.raises(UserError, match=r"probability must lie in \[0, 1\], got 3"):
        data.flip(KEY, images, 3)
    order, center, floats = jnp.arange(BATCH), (3, 3), images.astype(jnp.float32)
    for lam in (-0.1, 1.5, float("nan")):
        message = rf"lam must lie in \[0, 1\], got {lam}"
        with pytest.raises(UserError, match=message):
            data.cutmix(images, order, lam, center)
        with pytest.raises(UserError, match=message):
            data.cutmix_share((8, 6), lam, center)
        with pytest.raises(UserError, match=message):
            data.mixup(floats, order, lam)
