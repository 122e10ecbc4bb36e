import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy.spatial.distance import cdist

from jkd.errors import UserError
from jkd.gan import discriminator_contrastive_loss, generator_contrastive_loss

TARGET, SOURCE = np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 1]], np.float32)
SHOTS = np.array([[0, 1], [1, -1], [-1, 0]], np.float32)
FEATURES = arrays(np.float32, (3, 2, 2), elements=st.floats(0.125, 8, width=32) | st.floats(-8, -0.125, width=32))


@jax.jit
def both(target, source, shots, tau=0.07):
    """Values of both losses, and the gradients with respect to all features."""
    of_generator = jax.value_and_grad(lambda t, s: generator_contrastive_loss(t, s, tau=tau), (0, 1))
    of_discriminator = jax.value_and_grad(lambda f, s, x: discriminator_contrastive_loss(f, s, x, tau=tau), (0, 1, 2))
    return of_generator(target, source), of_discriminator(target, source, shots)


def values(*args):
    return np.array([value for value, _ in both(*args)])


@pytest.mark.parametrize(("tau", "expected"), [(0.07, [0.007580, 2.107215]), (1.0, [0.479110, 0.967207])])
def test_by_hand(tau, expected):
    np.testing.assert_allclose(values(TARGET, SOURCE, SHOTS, tau), expected, atol=1e-6)


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_equal_features(tau):
    same = np.ones((4, 3), np.float32)
    np.testing.assert_allclose(values(same, same, np.ones((10, 3), np.float32), tau), np.log([4, 11]), rtol=1e-5)


def test_orthonormal_matches():
    with jax.enable_x64(True):
        loss = jax.jit(lambda tau: generator_contrastive_loss(np.eye(4), np.eye(4), tau=tau))
        found = [loss(0.07), loss(1.0)]
    np.testing.assert_allclose(found, [1.8746e-6, 0.743668], rtol=1e-4)


def test_a_double_loop_agrees():
    draw = np.random.default_rng(0)
    target, source, shots = draw.normal(size=(4, 6)), draw.normal(size=(4, 6)), draw.normal(size=(3, 6))
    pairs, away = (np.exp((1 - cdist(target, x, "cosine")) / 0.3) for x in (source, shots))
    generator = [-np.log(pairs[i, i] / sum(pairs[i, j] for j in range(4))) for i in range(4)]
    discriminator = [-np.log(pairs[i, i] / (pairs[i, i] + sum(away[i]))) for i in range(4)]
    with jax.enable_x64(True):
        found = generator_contrastive_loss(target, source, tau=0.3, reduction="none")
        np.testing.assert_allclose(found, generator, rtol=1e-10)
        assert generator_contrastive_loss(target, source, tau=0.3, reduction="sum") == pytest.approx(sum(generator))
        found = discriminator_contrastive_loss(target, source, shots, tau=0.3, reduction="none")
        np.testing.assert_allclose(found, discriminator, rtol=1e-10)


def test_gradients_and_where_they_stop():
    draw = np.random.default_rng(0)
    features = tuple(draw.normal(size=(n, 6)) for n in (4, 4, 3))
    with jax.enable_x64(True):
        (_, (to_target, to_source)), (_, of_discriminator) = both(*features)
        check_grads(
            jax.jit(
                lambda f, s, x: (
                    discriminator_contrastive_loss(f, s, x, tau=0.5)
                    + generator_contrastive_loss(f, jax.lax.stop_gradient(features[1]), tau=0.5)
                )
            ),
            features,
            order=1,
            modes=["rev"],
        )
    np.testing.assert_array_equal(to_source, 0)
    assert all(np.abs(part).max() > 1e-3 for part in (to_target, *of_discriminator))


def test_zero_features_are_finite():
    zero = np.zeros((2, 2), np.float32)
    found = both(zero, zero, np.zeros((3, 2), np.float32))
    np.testing.assert_allclose([value for value, _ in found], np.log([2, 4]), rtol=1e-6)
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(found))


@given(target=FEATURES, source=FEATURES, shots=FEATURES, scale=arrays(np.float32, 3, elements=st.floats(0.5, 4)))
def test_invariances(target, source, shots, scale):
    expected = values(target, source, shots)
    assert (expected >= 0).all()
    scaled = values(target * scale[:, None, None], source * scale[::-1, None, None], shots * scale[0])
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-4)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(values(target[order], source[order], shots), expected, rtol=1e-4, atol=1e-5)
    # A rotation of the flat features: here one that permutes and flips them.
    turned = (
        x.reshape(3, 4)[:, [1, 0, 3, 2]] * np.array([[1, -1, 1, -1]], np.float32) for x in (target, source, shots)
    )
    np.testing.assert_allclose(values(*(x.reshape(3, 2, 2) for x in turned)), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_and_nan():
    low = both(*(x.astype(jnp.bfloat16) for x in (TARGET, SOURCE, SHOTS)))
    assert all(value.dtype == jnp.float32 and parts[0].dtype == jnp.bfloat16 for value, parts in low)
    np.testing.assert_allclose([value for value, _ in low], values(TARGET, SOURCE, SHOTS), rtol=1e-5)
    broken = np.array([[np.nan, 1], [1, 1]], np.float32)
    assert np.isnan(values(broken, SOURCE, SHOTS)).all()


def test_devices_agree(over_devices):
    target, source = np.random.default_rng(0).normal(size=(2, 8, 2)).astype(np.float32)
    np.testing.assert_allclose(values(*over_devices(target, source), SHOTS), values(target, source, SHOTS), rtol=2e-5)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(UserError, match="feat_t must hold at least 2 examples, got 1"):
        generator_contrastive_loss(TARGET[:1], SOURCE[:1])
    with pytest.raises(UserError, match=r"feat_t and feat_s must have the same shape, got \[2, 2\] and \[1, 2\]"):
        generator_contrastive_loss(TARGET, SOURCE[:1])
    with pytest.raises(UserError, match=r"d_real must have the shape \[batch, ...\] and not be empty, got \[0, 2\]"):
        discriminator_contrastive_loss(TARGET, SOURCE, SHOTS[:0])
    with pytest.raises(UserError, match=r"d_real must have features of the shape \[2\], as d_fake, got \[1\]"):
        discriminator_contrastive_loss(TARGET, SOURCE, SHOTS[:, :1])
    with pytest.raises(UserError, match="tau must be positive and finite, got 0"):
        discriminator_contrastive_loss(TARGET, SOURCE, SHOTS, tau=0)
    with pytest.raises(UserError, match="Unknown reduction"):
        generator_contrastive_loss(TARGET, SOURCE, reduction="max")
