import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd.errors import UserError
from jkd.gan import ada_update, augment_with_probability

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (32, 8, 8, 1)).astype(np.float32)
augment = jax.jit(augment_with_probability, static_argnames=("flip", "rotate"))


@functools.cache
def augmented(probability):
    return np.asarray(augment(KEY, IMAGES, probability))


def test_updates_by_hand():
    logits = np.array([2, 0.5, 3, -1], np.float32)  # r_t = 0.5
    step = 64 / 500_000
    assert ada_update(0.25, logits, images=64) == pytest.approx(0.25 - step)
    assert ada_update(0.25, logits, images=64, target=0.25) == pytest.approx(0.25 + step)
    assert ada_update(0.25, logits, images=64, target=0.5) == 0.25
    assert ada_update(0.25, logits, images=1000, adjust_images=2000) == 0
    assert ada_update(0.75, np.ones((2, 3), np.float32), images=1000, adjust_images=2000) == 1
    assert np.isnan(ada_update(0.5, np.array([1, np.nan], np.float32), images=64))


def test_updates_are_traced_and_pass_no_gradient():
    update = jax.jit(jax.value_and_grad(lambda p, logits: ada_update(p, logits, images=50, adjust_images=100), (0, 1)))
    value, slopes = update(0.25, jnp.ones(4, jnp.bfloat16))
    assert (value, value.dtype) == (0.75, jnp.float32)
    assert not any(np.asarray(slope).any() for slope in slopes)


def test_probability_zero_changes_nothing():
    np.testing.assert_array_equal(augmented(0.0), IMAGES)
    assert all((new != old).any() for new, old in zip(augmented(1.0), IMAGES, strict=True))
    np.testing.assert_array_equal(augment(KEY, IMAGES, 1.0), augmented(1.0))


def candidates(image):
    """The image mirrored, turned and moved in all ways."""
    for mirrored in (image, image[:, ::-1]):
        for turns in range(4):
            padded = np.pad(np.rot90(mirrored, turns), 1, mode="reflect")
            yield from (padded[row : row + 8, column : column + 8] for row in range(3) for column in range(3))


def test_pixels_are_moved_scaled_and_cut():
    chosen = []
    for new, old in zip(augmented(1.0)[..., 0], IMAGES[..., 0], strict=True):
        left = new != 0  # outside the cut square
        assert 32 <= left.sum() < 64
        sides = [np.ptp(np.nonzero(~left)[axis]) + 1 for axis in (0, 1)]
        assert max(sides) <= 4
        assert np.prod(sides) == (~left).sum()
        fits = [np.polynomial.Polynomial.fit(c[left], new[left], 1, full=True)[1][0] for c in candidates(old)]
        chosen.append(int(np.argmin([fit.sum() for fit in fits])))
        assert min(fit.sum() for fit in fits) < 1e-8
    assert len({c // 9 for c in chosen}) == 8
    assert len({c % 9 for c in chosen}) >= 7


@pytest.mark.parametrize("probability", [0.3, 0.8])
def test_how_often(probability):
    gray = np.full((512, 8, 8, 1), 0.5, np.float32)
    found = np.asarray(augment(KEY, gray, probability)).reshape(512, 64)
    assert (found == 0).any(1).mean() == pytest.approx(probability, abs=0.07)
    level = found.max(1, where=found != 0, initial=-np.inf)
    # Either brightness or contrast changes it.
    assert (level != 0.5).mean() == pytest.approx(1 - (1 - probability) ** 2, abs=0.07)


def test_what_may_be_left_out():
    wide = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None], (64, 8, 16, 1))
    found = np.asarray(augment(KEY, wide, 1.0, flip=False, rotate=False))[..., 0]
    # Without a mirror, levels rise from left to right except at reflected edges and in the cut square.
    steps = np.diff(found[:, :, 2:-2], axis=2)
    whole = (found[:, :, 2:-2] != 0).all(2)[:, :, None]
    assert whole.any()
    assert (np.where(whole, steps, 1) > 0).all()
    with pytest.raises(UserError, match=r"images must be square where rotate is True, got \[8, 16\]"):
        augment_with_probability(KEY, wide, 1.0)


def test_gradients_dtypes_and_nan():
    slope = jax.jit(jax.grad(lambda x, p: jnp.square(augment_with_probability(KEY, x, p)).sum()))
    with np.errstate(all="raise"):
        found = np.asarray(slope(IMAGES, 0.7))
    assert np.isfinite(found).all()
    assert (found != 0).mean() > 0.5
    np.testing.assert_array_equal(slope(IMAGES, 0.0), 2 * IMAGES)
    low = augment(KEY, IMAGES.astype(jnp.bfloat16), 0.5)
    assert (low.dtype, low.shape) == (jnp.bfloat16, IMAGES.shape)
    assert np.isnan(augment(KEY, IMAGES, np.nan)).all()


def test_devices_agree(over_devices):
    np.testing.assert_allclose(augment(KEY, *over_devices(IMAGES), 1.0), augmented(1.0), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(UserError, match=r"probability must lie in \[0, 1\], got 1.5"):
        augment_with_probability(KEY, IMAGES, 1.5)
    with pytest.raises(UserError, match=r"images must be floating point .* got uint8 \[32, 8, 8, 1\]"):
        augment_with_probability(KEY, IMAGES.astype(np.uint8), 0.5)
    with pytest.raises(UserError, match=r"\[batch, height, width, channels\], got float32 \[32, 8, 8\]"):
        augment_with_probability(KEY, IMAGES[..., 0], 0.5)
    with pytest.raises(UserError, match=r"probability must lie in \[0, 1\], got -0.1"):
        ada_update(-0.1, np.ones(2, np.float32), images=64)
    with pytest.raises(UserError, match="images must be positive and finite, got 0"):
        ada_update(0.1, np.ones(2, np.float32), images=0)
    with pytest.raises(UserError, match="real_logits must not be empty"):
        ada_update(0.1, np.ones(0, np.float32), images=64)
