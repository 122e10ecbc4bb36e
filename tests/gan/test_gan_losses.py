import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

from jkd import gan
from jkd.errors import UserError

REAL, FAKE = np.array([1.0, 0.5], np.float32), np.array([-1.0, 0.0], np.float32)
LOGITS = arrays(np.float32, 4, elements=st.floats(-50, 50, width=32))
# name -> loss(real, fake)
PAIRWISE = {
    name: getattr(gan, name)
    for name in (
        "nonsaturating_logistic_d_loss",
        "hinge_d_loss",
        "least_squares_d_loss",
        "wgan_d_loss",
        "relativistic_logistic_d_loss",
        "relativistic_logistic_g_loss",
        "contrastive_half",
    )
}
ONE_SIDED = {
    name: getattr(gan, name)
    for name in (
        "nonsaturating_logistic_g_loss",
        "hinge_g_loss",
        "least_squares_g_loss",
        "wgan_g_loss",
        "drift_penalty",
    )
}
WHOLE = {
    "dual_d": gan.dual_contrastive_d_loss,
    "dual_g": gan.dual_contrastive_g_loss,
    "dual_g_saturating": lambda r, f: gan.dual_contrastive_g_loss(r, f, saturating=True),
}
LOSSES = PAIRWISE | {name: lambda r, f, loss=loss: loss(f) for name, loss in ONE_SIDED.items()} | WHOLE
SHIFT_INVARIANT = [*WHOLE, "relativistic_logistic_d_loss", "relativistic_logistic_g_loss", "contrastive_half"]


def values_and_gradients(r, f):
    """Of all losses, by one program."""
    return {name: jax.value_and_grad(loss, (0, 1))(r, f) for name, loss in LOSSES.items()}


step = jax.jit(values_and_gradients)


def softplus(x):
    return np.logaddexp(x, 0)


def test_dual_contrastive_by_hand():
    found = step(REAL, FAKE)
    assert found["contrastive_half"][0] == pytest.approx(0.505868, abs=1e-6)
    assert gan.contrastive_half(-FAKE, -REAL) == pytest.approx(0.493313, abs=1e-6)
    value, (to_real, to_fake) = found["dual_d"]
    assert value == pytest.approx(0.999181, abs=1e-6)
    np.testing.assert_allclose(to_real, [-0.310353, -0.462449], atol=1e-6)
    np.testing.assert_allclose(to_fake, [0.237929, 0.534874], atol=1e-6)
    assert found["dual_g"][0] == pytest.approx(4.303601, abs=1e-6)
    assert found["dual_g_saturating"][0] == pytest.approx(-0.999181, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (1, 3)])
def test_equal_logits(n, m):
    value = gan.dual_contrastive_d_loss(np.full(n, 2, np.float32), np.full(m, 2, np.float32))
    assert value == pytest.approx(np.log(1 + n) + np.log(1 + m), rel=1e-6)


def test_one_pair_is_twice_the_relativistic_loss():
    pair = np.array([0.3], np.float32), np.array([-0.2], np.float32)
    assert gan.dual_contrastive_d_loss(*pair) == pytest.approx(0.948154, abs=1e-6)
    assert 2 * gan.relativistic_logistic_d_loss(*pair) == pytest.approx(0.948154, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nonsaturating_logistic_d_loss", softplus(-REAL) + softplus(FAKE)),
        ("nonsaturating_logistic_g_loss", softplus(-FAKE)),
        ("hinge_d_loss", [0 + 0, 0.5 + 1]),
        ("hinge_g_loss", [1, 0]),
        ("least_squares_d_loss", [0 + 1, 0.25 + 0]),
        ("least_squares_g_loss", [4, 1]),
        ("wgan_d_loss", [-2, -0.5]),
        ("wgan_g_loss", [1, 0]),
        ("relativistic_logistic_d_loss", softplus(np.array([-2, -0.5]))),
        ("relativistic_logistic_g_loss", softplus(np.array([2, 0.5]))),
        ("drift_penalty", [1, 0]),
        ("contrastive_half", softplus(np.log(np.exp(-1) + 1) - REAL)),
    ],
)
def test_by_hand_and_reduced(name, expected):
    loss = LOSSES[name] if name in PAIRWISE else ONE_SIDED[name]
    logits = (REAL, FAKE) if name in PAIRWISE else (FAKE,)
    np.testing.assert_allclose(loss(*logits, reduction="none"), expected, atol=1e-6)
    assert loss(*logits, reduction="sum") == pytest.approx(np.sum(expected), abs=1e-6)
    assert step(REAL, FAKE)[name][0] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_naive_double_loop_agrees():
    real, fake = np.random.default_rng(0).normal(size=(2, 5))
    real = real[:3]
    expected = np.mean([-np.log(np.exp(r) / (np.exp(r) + sum(np.exp(f) for f in fake))) for r in real])
    expected += np.mean([-np.log(np.exp(-f) / (np.exp(-f) + sum(np.exp(-r) for r in real))) for f in fake])
    with jax.enable_x64(True):
        value = jax.jit(gan.dual_contrastive_d_loss)(real, fake)
    assert value == pytest.approx(expected, rel=1e-12)


def test_gradients():
    real, fake = np.random.default_rng(0).normal(size=(2, 4)) * 3
    with jax.enable_x64(True):
        check_grads(
            jax.jit(lambda r, f: jnp.stack([loss(r, f) for loss in LOSSES.values()])),
            (real, fake),
            order=1,
            modes=["rev"],
        )


def test_large_logits_are_finite():
    large = np.array([1e4, -1e4, 1e4, -1e4], np.float32)
    for pair in ((large, -large), (-large, large[::-1]), (large, large)):
        found = step(*pair)
        assert all(np.isfinite(part).all() for part in jax.tree.leaves(found))


@given(real=LOGITS, fake=LOGITS, shift=st.floats(-20, 20, width=32))
def test_adding_a_number_to_all_logits_changes_nothing(real, fake, shift):
    before, after = step(real, fake), step(real + np.float32(shift), fake + np.float32(shift))
    for name in SHIFT_INVARIANT:
        np.testing.assert_allclose(after[name][0], before[name][0], rtol=1e-5, atol=5e-5)
        assert sum(np.sum(part) for part in before[name][1]) == pytest.approx(0, abs=1e-5)


@given(real=LOGITS, fake=LOGITS)
def test_signs_order_and_roles(real, fake):
    found = step(real, fake)
    for name, value in found.items():
        if "wgan" not in name and name not in ("hinge_g_loss", "dual_g_saturating"):
            assert value[0] >= 0
    np.testing.assert_allclose(step(-fake, -real)["dual_d"][0], found["dual_d"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step(fake, real)["dual_d"][0], found["dual_g"][0], rtol=1e-5, atol=1e-6)
    permuted = step(real[[2, 0, 3, 1]], fake[[2, 0, 3, 1]])
    for name, value in found.items():
        np.testing.assert_allclose(permuted[name][0], value[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_becomes_float32():
    low = [np.random.default_rng(0).normal(size=4).astype(jnp.bfloat16) for _ in range(2)]
    found, expected = step(*low), step(*(x.astype(np.float32) for x in low))
    for name, (value, gradients) in found.items():
        assert value.dtype == jnp.float32
        assert gradients[0].dtype == jnp.bfloat16
        assert value == pytest.approx(float(expected[name][0]), rel=1e-6)


def test_nan_is_kept():
    broken = np.array([0, np.nan, 1, 2], np.float32)
    found = step(broken, broken)
    assert all(np.isnan(value) for value, _ in found.values())


def test_devices_agree(over_devices):
    real, fake = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    both = jax.jit(lambda r, f: (gan.dual_contrastive_d_loss(r, f), gan.nonsaturating_logistic_d_loss(r, f)))
    np.testing.assert_allclose(both(*over_devices(real, fake)), both(real, fake), rtol=1e-6)


def test_locations_of_patches_count_each():
    real, fake = np.random.default_rng(0).normal(size=(2, 2, 3, 1)).astype(np.float32)
    assert gan.hinge_d_loss(real, fake, reduction="none").shape == (2, 3, 1)
    np.testing.assert_allclose(
        gan.nonsaturating_logistic_d_loss(real, fake[:1]), softplus(-real).mean() + softplus(fake[:1]).mean(), rtol=1e-6
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LOSSES)
def test_empty_or_integer_logits(name):
    none = np.zeros(0, np.float32)
    with pytest.raises(UserError, match=r"must not be empty, got the shape \[0\]"):
        LOSSES[name](FAKE if name in PAIRWISE else none, none)
    with pytest.raises(UserError, match="must be floating point, got int32"):
        LOSSES[name](np.zeros(2, np.int32), np.zeros(2, np.int32))


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_and_reductions():
    matrix = np.zeros((2, 1), np.float32)
    with pytest.raises(UserError, match=r"real_logits must have the shape \[count\].*\[2, 1\]"):
        gan.dual_contrastive_d_loss(matrix, FAKE)
    with pytest.raises(UserError, match=r"others must have the shape \[count\]"):
        gan.contrastive_half(REAL, matrix)
    with pytest.raises(UserError, match=r"real_logits and fake_logits must have the same shape, got \[2\] and \[1\]"):
        gan.relativistic_logistic_g_loss(REAL, FAKE[:1])
    with pytest.raises(UserError, match="must have the same shape"):
        gan.hinge_d_loss(REAL, FAKE[:1], reduction="none")
    with pytest.raises(UserError, match="Unknown reduction 'meam'"):
        gan.wgan_d_loss(REAL, FAKE, reduction="meam")
