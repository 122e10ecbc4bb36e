import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from jkd import gan
from jkd.errors import UserError

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
REAL, FAKE = DRAW.normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
FIRST, SECOND = DRAW.normal(size=(4, 5)).astype(np.float32) / 2, DRAW.normal(size=(5, 1)).astype(np.float32)


def flat(x):
    return x.reshape(len(x), -1)


def mlp(weights, x):
    return jnp.tanh(flat(x) @ weights[0]) @ weights[1]


def quadratic(scale, x):
    """Its gradient at x is scale * x."""
    return scale * jnp.square(flat(x)).sum(1) / 2


def linear(scale, x):
    return scale * flat(x).sum(1)


def constant(scale, x):
    return scale * jnp.ones(len(x))


PENALTIES = {
    "r1": lambda d_fn: gan.r1_penalty(d_fn, REAL),
    "zero": lambda d_fn: gan.zero_centered_gradient_penalty(d_fn, REAL, FAKE, KEY),
    "one": lambda d_fn: gan.one_centered_gradient_penalty(d_fn, REAL, FAKE, KEY),
}


@jax.jit
def slopes(scale):
    """Value and gradient with respect to `scale` of each penalty at each discriminator, by one program."""
    return {
        (d_fn.__name__, name): jax.value_and_grad(lambda s, f=penalty, d=d_fn: f(lambda x: d(s, x)))(scale)
        for d_fn in (quadratic, linear, constant)
        for name, penalty in PENALTIES.items()
    }


def test_slopes_by_hand():
    found = slopes(jnp.float32(3))
    expected = 9 * np.square(REAL).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(found["quadratic", "r1"], [expected, 2 * expected / 3], rtol=1e-6)
    # Four pixels: the squared norm is 4 scale^2 everywhere.
    np.testing.assert_allclose(found["linear", "r1"], [36, 24], rtol=1e-6)
    np.testing.assert_allclose(found["linear", "zero"], [36, 24], rtol=1e-6)
    np.testing.assert_allclose(found["linear", "one"], [25, 20], rtol=1e-6)


def test_flat_discriminators_have_finite_gradients():
    found = slopes(jnp.float32(0))
    for name, penalty in found.items():
        np.testing.assert_array_equal(penalty, [1.0 if name[1] == "one" else 0.0, 0.0], err_msg=str(name))
    assert slopes(jnp.float32(1))["constant", "one"][0] == 1


@given(scale=st.floats(0.125, 64, width=32))
def test_steeper_discriminators(scale):
    found, unit = slopes(jnp.float32(scale)), slopes(jnp.float32(1))
    for name in (("quadratic", "r1"), ("quadratic", "zero"), ("linear", "zero")):
        np.testing.assert_allclose(found[name][0], scale**2 * unit[name][0], rtol=1e-5)
    np.testing.assert_allclose(found["linear", "one"][0], (2 * scale - 1) ** 2, rtol=1e-4, atol=1e-6)


def test_points_lie_between_the_two_images():
    one = np.ones((64, 2), np.float32)
    slope = gan.zero_centered_gradient_penalty(lambda x: quadratic(1, x), 0 * one, one, KEY, reduction="none")
    share = np.sqrt(np.asarray(slope) / 2)
    assert share.min() >= 0
    assert share.max() < 1
    assert share.mean() == pytest.approx(0.5, abs=0.1)
    assert len(np.unique(share)) == 64
    same = gan.zero_centered_gradient_penalty(lambda x: quadratic(1, x), one, one, KEY)
    assert same == pytest.approx(2)


def test_per_example_values_and_patches():
    each = gan.r1_penalty(lambda x: quadratic(1, x), REAL, reduction="none")
    np.testing.assert_allclose(each, np.square(REAL).sum((1, 2, 3)), rtol=1e-6)
    patches = gan.r1_penalty(lambda x: jnp.square(x) / 2, REAL, reduction="sum")
    assert patches == pytest.approx(np.square(REAL).sum(), rel=1e-6)


def test_gradients():
    with jax.enable_x64(True):
        weights = FIRST.astype(np.float64), SECOND.astype(np.float64)
        real, fake = REAL.astype(np.float64), FAKE.astype(np.float64)

        def penalties(first, second):
            d_fn = lambda x: mlp((first, second), x)  # noqa: E731
            between = gan.one_centered_gradient_penalty(d_fn, real, fake, KEY)
            return gan.r1_penalty(d_fn, real) + between

        check_grads(jax.jit(penalties), weights, order=1, modes=["rev"])


def test_devices_agree(over_devices):
    images = np.random.default_rng(0).normal(size=(8, 2, 2, 1)).astype(np.float32)
    step = jax.jit(jax.value_and_grad(lambda s, x: gan.r1_penalty(lambda x: quadratic(s, x), x)))
    np.testing.assert_allclose(step(2.0, *over_devices(images)), step(2.0, images), rtol=1e-5)


def test_bfloat16_and_nan():
    low = gan.r1_penalty(lambda x: quadratic(1, x).astype(jnp.bfloat16), REAL.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert low == pytest.approx(np.square(REAL).sum((1, 2, 3)).mean(), rel=0.02)
    broken = REAL.copy()
    broken[0, 0, 0, 0] = np.nan
    found = gan.one_centered_gradient_penalty(lambda x: quadratic(1, x), broken, FAKE, KEY, reduction="none")
    np.testing.assert_array_equal(np.isnan(found), [True, False, False])


# Path lengths.


def paint(scale, w):
    """Every pixel of [batch, 2, 3, 4] is scale times a component of w [batch, layers, 4], summed over layers."""
    return jnp.broadcast_to(scale * w.sum(1)[:, None, None], (len(w), 2, 3, 4))


@jax.jit
def path(scale, mean, latents):
    def penalty(s):
        found = gan.path_length_penalty(lambda w: paint(s, w), latents, KEY, mean, decay=0.25)
        return found.penalty, found.mean

    return jax.value_and_grad(penalty, has_aux=True)(scale)


def test_path_length_by_hand():
    latents = np.zeros((5, 2, 4), np.float32)
    noise = np.asarray(jax.random.normal(KEY, (5, 2, 3, 4))) / np.sqrt(6)
    # Each layer's slope is 3 times the noise summed over the pixels; the mean over layers is that of one.
    length = 3 * np.linalg.norm(noise.sum((1, 2)), axis=1)
    mean = 0.5 + 0.25 * (length.mean() - 0.5)
    (penalty, moved), slope = path(jnp.float32(3), 0.5, latents)
    assert moved == pytest.approx(mean, rel=1e-5)
    assert penalty == pytest.approx(np.square(length - mean).mean(), rel=1e-5)
    # The gradient passes through the mean: lengths grow by length / 3, and the mean by a quarter of theirs.
    expected = (2 * (length - mean) * (length - 0.25 * length.mean()) / 3).mean()
    assert slope == pytest.approx(expected, rel=1e-4)


def test_flat_generators_have_finite_path_gradients():
    (penalty, moved), slope = path(jnp.float32(0), 0.5, np.ones((5, 2, 4), np.float32))
    assert (moved, penalty, slope) == (0.375, pytest.approx(0.375**2), 0)


def test_nothing_leaves_by_the_mean():
    latents = np.ones((2, 4), np.float32)

    def moved(scale, mean):
        return gan.path_length_penalty(lambda w: scale * w, latents, KEY, mean).mean

    assert jax.grad(moved, (0, 1))(2.0, 1.0) == (0, 0)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(UserError, match=r"images must have the shape \[batch, ...\].*got \[0, 4\]"):
        gan.r1_penalty(flat, np.zeros((0, 4), np.float32))
    with pytest.raises(UserError, match="images must be floating point, got uint8"):
        gan.r1_penalty(flat, np.zeros((2, 4), np.uint8))
    with pytest.raises(UserError, match=r"same shape, got \[3, 2, 2, 1\] and \[2, 2, 2, 1\]"):
        gan.one_centered_gradient_penalty(flat, REAL, FAKE[:2], KEY)
    with pytest.raises(UserError, match=r"decay must lie in \[0, 1\], got 1.5"):
        gan.path_length_penalty(flat, np.ones((2, 4), np.float32), KEY, 0.0, decay=1.5)


# PyTorch (the extra `oracles`).


def test_r1_gradients_in_pytorch():
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        weights = tuple(jnp.asarray(w, jnp.float64) for w in (FIRST, SECOND))
        real = jnp.asarray(REAL, jnp.float64)
        value, found = jax.value_and_grad(lambda w: gan.r1_penalty(lambda x: mlp(w, x), real))(weights)
    first, second = (torch.tensor(np.asarray(w), dtype=torch.float64, requires_grad=True) for w in (FIRST, SECOND))
    x = torch.tensor(REAL, dtype=torch.float64, requires_grad=True)
    logits = torch.tanh(x.reshape(3, -1) @ first) @ second
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = slope.pow(2).reshape(3, -1).sum(1).mean()
    penalty.backward()
    assert value == pytest.approx(penalty.item(), rel=1e-10)
    for ours, theirs in zip(found, (first, second), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_path_length_gradients_in_pytorch():
    torch = pytest.importorskip("torch")
    latents, kernel = DRAW.normal(size=(3, 2, 4)), DRAW.normal(size=(4, 12))
    with jax.enable_x64(True):

        def penalty(kernel):
            def g_fn(w):
                return jnp.tanh(w.sum(1) @ kernel).reshape(3, 2, 2, 3)

            return gan.path_length_penalty(g_fn, jnp.asarray(latents), KEY, 0.3, decay=0.1)

        value, found = jax.value_and_grad(lambda k: penalty(k).penalty)(jnp.asarray(kernel))
        moved = penalty(jnp.asarray(kernel)).mean
        noise = np.array(jax.random.normal(KEY, (3, 2, 2, 3), jnp.float64))
    weight = torch.tensor(kernel, requires_grad=True)
    w = torch.tensor(latents, requires_grad=True)
    images = torch.tanh(w.sum(1) @ weight).reshape(3, 2, 2, 3)
    (slope,) = torch.autograd.grad((images * torch.tensor(noise) / 2).sum(), w, create_graph=True)
    lengths = slope.pow(2).sum(2).mean(1).sqrt()
    mean = 0.3 + 0.1 * (lengths.mean() - 0.3)
    expected = (lengths - mean).pow(2).mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-10)
    assert moved == pytest.approx(mean.item(), rel=1e-10)
    np.testing.assert_allclose(found, weight.grad.numpy(), rtol=1e-8, atol=1e-12)
