import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import pdist

from jkd import gan
from jkd.errors import UserError

KEY = jax.random.key(0)
MARGIN = 2 * np.log(99)  # of two probabilities, 0.99 and 0.01
IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 1)).astype(np.float32)
separation, twins, saturation = jax.jit(gan.logit_separation), jax.jit(gan.duplicates), jax.jit(gan.saturation)
ratio = jax.jit(gan.diversity_ratio)


def test_separation_by_hand():
    real = np.array([0, MARGIN + 0.01, 20], np.float32)
    # Pairs with f = 0: one is not above the margin; with f = 12: none is.
    assert separation(real, np.array([0, 12], np.float32)) == pytest.approx(2 / 6)
    assert separation(real, np.array([[20, 30]], np.float32)) == 0
    assert separation(real + 100, np.zeros(5, np.float32)) == 1
    assert gan.logit_separation(np.ones(2, np.float32), np.zeros(2, np.float32), confidence=0.5) == 1
    assert gan.logit_separation(np.zeros(2, np.float32), np.zeros(2, np.float32), confidence=0.5) == 0
    assert separation(np.array([np.inf, 0], np.float32), np.array([-np.inf, 0], np.float32)) == 0.75
    assert np.isnan(separation(np.array([np.nan, 0, 1], np.float32), np.zeros(2, np.float32)))
    assert np.isnan(separation(real, np.array([0, np.nan], np.float32)))


LOGITS = arrays(np.float32, 5, elements=st.integers(-16, 16).map(float))


@given(real=LOGITS, fake=LOGITS, shift=st.sampled_from([-64.0, 0.5, 128.0]))
def test_separation_counts_pairs(real, fake, shift):
    expected = np.mean([r - f > MARGIN for r in real for f in fake])
    assert separation(real, fake) == pytest.approx(expected, abs=1e-6)
    assert separation(real + np.float32(shift), fake + np.float32(shift)) == pytest.approx(expected, abs=1e-6)


def test_diversity_agrees_with_scipy():
    other = np.tanh(3 * IMAGES[:9])
    expected = pdist(other.reshape(9, -1)).mean() / pdist(IMAGES.reshape(16, -1)).mean()
    assert ratio(other, IMAGES) == pytest.approx(expected, rel=1e-5)
    assert ratio(IMAGES[::-1], IMAGES) == pytest.approx(1, rel=1e-6)
    assert ratio(0.25 * IMAGES, IMAGES) == pytest.approx(0.25, rel=1e-6)
    assert ratio(0 * IMAGES, IMAGES) == 0
    assert ratio(IMAGES.astype(jnp.bfloat16), IMAGES).dtype == jnp.float32


def test_diversity_of_drawn_pairs():
    keys = jax.random.split(KEY, 64)
    found = jax.jit(jax.vmap(lambda key: gan.diversity_ratio(2 * IMAGES[:12], IMAGES, key)))(keys)
    assert np.mean(found) == pytest.approx(float(gan.diversity_ratio(2 * IMAGES[:12], IMAGES)), rel=0.03)
    assert np.std(found) > 1e-3
    # Never an image with itself: of two, the one pair there is.
    assert ratio(IMAGES[:2], IMAGES[:2] / 4, KEY) == pytest.approx(4, rel=1e-6)


def test_diversity_without_a_scale():
    assert np.isnan(ratio(IMAGES, np.ones_like(IMAGES)))
    assert np.isnan(ratio(np.ones_like(IMAGES), np.ones_like(IMAGES)))
    broken = IMAGES.copy()
    broken[0, 0, 0, 0] = np.nan
    assert np.isnan(ratio(broken, IMAGES))
    assert np.isnan(gan.diversity_ratio(IMAGES, broken))


def test_duplicates_by_hand():
    assert twins(IMAGES) == 0
    copied = IMAGES.copy()
    copied[5], copied[7] = copied[2], -copied[3]
    assert twins(copied) == 2 / 16
    copied[9] = copied[2] + np.float32(0.009)
    assert twins(copied) == 3 / 16
    copied[9] = copied[2] + np.float32(0.011)
    assert twins(copied) == 2 / 16
    assert twins(copied, tolerance=0.02) == 3 / 16
    assert twins(np.zeros_like(IMAGES)) == 1
    copied[0, 0, 0, 0] = np.nan
    assert np.isnan(twins(copied))


def test_saturation_by_hand():
    images = np.array([[-1, -0.995, 0.999], [1, 0.5, 0.98]], np.float32)
    assert saturation(images) == pytest.approx(2 / 6)
    assert saturation(images, tolerance=0.03) == pytest.approx(3 / 6)
    assert saturation(np.ones((2, 3), np.float32)) == 1
    assert saturation(np.zeros((2, 3), np.float32)) == 0
    assert np.isnan(saturation(images * np.nan))


def test_devices_agree(over_devices):
    copied = np.concatenate([IMAGES[:12], IMAGES[:4]])
    logits = IMAGES.reshape(16, 16)[:, 0] * 20
    measure = jax.jit(
        lambda images, real, r, f: (
            gan.diversity_ratio(images, real),
            gan.duplicates(images),
            gan.logit_separation(r, f),
        )
    )
    given = copied, IMAGES, logits, -logits[::-1]
    np.testing.assert_allclose(measure(*over_devices(*given)), measure(*given), rtol=1e-6)


def test_verdicts():
    sound = {"diversity": 0.9, "duplicates": 0.0, "separation": 0.5, "saturation": 0.6}
    assert gan.verdict() is None
    assert gan.verdict(**sound) is None
    for name, value, words in (
        ("diversity", jnp.float32(0.05), "generator has collapsed.*diversity ratio 0.05, at least 0.1"),
        ("duplicates", 0.75, "generator has collapsed.*share of duplicates 0.75, at most 0.5"),
        ("separation", np.float32(1), "discriminator has won.*logit separation 1, at most 0.99"),
        ("saturation", 1.0, "saturated at one value.*saturation 1, at most 0.99"),
        ("separation", np.nan, "logit separation is NaN"),
        ("diversity", jnp.nan, "diversity ratio is NaN"),
    ):
        found = gan.verdict(**(sound | {name: value}))
        assert found is not None
        assert re.search(words, found)
        assert ";" not in found
    assert gan.verdict(diversity=0.05, min_diversity=0.01) is None
    assert gan.verdict(duplicates=0.5, separation=0.99, diversity=0.1, saturation=0.99) is None
    both = gan.verdict(diversity=0.0, separation=1.0)
    assert both is not None
    assert both.count(";") == 1


def test_a_collapsed_game_is_seen():
    collapsed = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    assert "collapsed" in gan.verdict(diversity=ratio(collapsed, IMAGES), duplicates=twins(collapsed))
    assert gan.verdict(diversity=ratio(IMAGES[::-1], IMAGES), duplicates=twins(IMAGES)) is None


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(UserError, match="real must hold different images, got copies of one"):
        gan.diversity_ratio(IMAGES, np.ones_like(IMAGES))
    with pytest.raises(UserError, match="generated must hold at least 2 images to compare, got 1"):
        gan.diversity_ratio(IMAGES[:1], IMAGES)
    with pytest.raises(UserError, match=r"images of one shape, got \[16, 4, 4, 1\] and \[16, 4, 4\]"):
        gan.diversity_ratio(IMAGES, IMAGES[..., 0])
    with pytest.raises(UserError, match="images must be floating point, got uint8"):
        gan.duplicates(IMAGES.astype(np.uint8))
    with pytest.raises(UserError, match="tolerance must be positive and finite, got 0"):
        gan.duplicates(IMAGES, tolerance=0)
    with pytest.raises(UserError, match=r"confidence must lie in \[0.5, 1\), got 1"):
        gan.logit_separation(IMAGES, IMAGES, confidence=1)
    with pytest.raises(UserError, match="fake_logits must not be empty"):
        gan.logit_separation(np.ones(2, np.float32), np.ones(0, np.float32))
