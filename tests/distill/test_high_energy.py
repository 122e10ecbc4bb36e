import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd.distill import (
    energy_score,
    high_energy_capacity,
    high_energy_kd_loss,
    high_energy_partners,
    kd_loss,
    select_high_energy,
)
from jkd.errors import UserError

KEY = jax.random.key(0)
loss = jax.jit(high_energy_kd_loss, static_argnames="reduction")
gradients = jax.jit(jax.value_and_grad(high_energy_kd_loss, (0, 1)))
energies = jax.jit(energy_score)
SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def select():
    return jax.jit(select_high_energy, static_argnums=3)


@pytest.fixture(scope="module")
def partners():
    return jax.jit(high_energy_partners)


@pytest.fixture(scope="module")
def logits():
    draw = np.random.default_rng(0)
    return draw.normal(0, 3, (2, 8, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("rate", "batch", "capacity"), [(0.5, 64, 48), (0.2, 10, 3), (0.4, 64, 39), (1.0, 64, 64), (0.01, 8, 1)]
)
def test_capacity_by_hand(rate, batch, capacity):
    assert high_energy_capacity(rate, batch) == capacity


def test_capacity_slack():
    assert high_energy_capacity(0.25, 64, slack=1.0) == 16
    assert high_energy_capacity(0.25, 64, slack=9.0) == 64


def test_selection_by_hand(select):
    index, weights = select(KEY, np.array([0.0, 3.0, 1.0, 2.0, 1.0]), 1.0, 4)
    assert set(np.asarray(index)[:2]) == {1, 3}
    np.testing.assert_array_equal(weights, [1, 1, 0, 0])
    assert index.dtype == jnp.int32


@given(energy=arrays(np.float32, 12, elements=st.integers(-2, 2).map(float)), seed=SEEDS)
def test_hard_examples_come_first_and_once_and_fill_the_rest(select, energy, seed):
    index, weights = map(np.asarray, select(jax.random.key(seed), energy, 0.0, 6))
    hard = min(np.sum(energy > 0), 6)
    np.testing.assert_array_equal(weights, np.arange(6) < hard)
    assert len(set(index[:hard])) == hard
    assert np.all(energy[index[:hard]] > 0)
    if hard >= 2:
        np.testing.assert_array_equal(index, np.resize(index[:hard], 6))
    else:
        assert len(set(index)) == 6


def test_chance_decides_which_stay_out(select):
    pick = jax.vmap(lambda key: select(key, np.ones(8), 0.0, 2).indices)
    counts = np.bincount(np.ravel(pick(jax.random.split(KEY, 2000))), minlength=8)
    # 500 expected each, standard deviation 19.
    assert np.all(np.abs(counts - 500) < 100)


@given(weights=arrays(np.float32, 6, elements=st.sampled_from([0.0, 1.0])), seed=SEEDS)
def test_partners_keep_valid_slots_and_padding_apart(partners, weights, seed):
    found = np.asarray(partners(jax.random.key(seed), weights))
    np.testing.assert_array_equal(np.sort(found), np.arange(6))
    np.testing.assert_array_equal(weights[found], weights)


def test_all_partners_are_equally_likely(partners):
    weights = np.array([1, 1, 1, 0, 0], np.float32)
    found = np.asarray(jax.vmap(lambda key: partners(key, weights))(jax.random.split(KEY, 3000)))
    for slot in range(3):
        counts = np.bincount(found[:, slot], minlength=5)
        np.testing.assert_array_equal(counts[3:], 0)
        # 1000 expected each, standard deviation 26.
        assert np.all(np.abs(counts[:3] - 1000) < 130)


def test_loss_is_the_mean_over_valid_slots(logits):
    student, teacher = logits
    each = np.asarray(kd_loss(student, teacher, 4.0, reduction="none"))
    weights = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)
    assert loss(student, teacher, 4.0, weights) == pytest.approx(each[:3].mean(), rel=1e-6)
    total = loss(student, teacher, 4.0, weights, reduction="sum")
    assert total == pytest.approx(each[:3].sum(), rel=1e-6)
    values = high_energy_kd_loss(student, teacher, 4.0, weights, reduction="none")
    np.testing.assert_array_equal(values, each * weights)


@pytest.mark.parametrize("valid", [0, 1])
def test_nothing_to_mix_weighs_nothing(logits, valid):
    weights = (np.arange(8) < valid).astype(np.float32)
    value, (gradient, _) = gradients(*logits, 4.0, weights)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_padding_gets_no_gradient_and_the_teacher_none(logits):
    weights = (np.arange(8) < 5).astype(np.float32)
    student, teacher = map(np.asarray, gradients(*logits, 4.0, weights)[1])
    assert np.all(np.any(student[:5] != 0, axis=1))
    np.testing.assert_array_equal(student[5:], 0)
    np.testing.assert_array_equal(teacher, 0)


def augmented_loss(key, images, teacher_logits, e_high, head):
    """The composition of the docstring with a mixer and linear networks."""
    pick, mix = jax.random.split(key)
    index, weights = select_high_energy(pick, energy_score(teacher_logits), e_high, 6)
    chosen = images[index]
    mixed = 0.7 * chosen + 0.3 * chosen[high_energy_partners(mix, weights)]
    return high_energy_kd_loss(mixed @ head, mixed @ -head, 4.0, weights)


def test_composition_sees_hard_images_only(logits):
    images, teacher = logits
    energy = np.asarray(energies(teacher))
    e_high = float(np.median(energy))
    step = jax.jit(augmented_loss)
    value = step(KEY, images, teacher, e_high, np.eye(5, dtype=np.float32))
    changed = np.where((energy <= e_high)[:, None], 100.0, images).astype(np.float32)
    assert value > 0
    assert step(KEY, changed, teacher, e_high, np.eye(5, dtype=np.float32)) == pytest.approx(float(value))


def test_eight_devices_equal_one(logits, over_devices):
    e_high = float(np.median(np.asarray(energies(logits[1]))))
    images, teacher = (np.tile(x, (2, 1)) for x in logits)
    step = jax.jit(jax.value_and_grad(augmented_loss, 4))
    one = step(KEY, images, teacher, e_high, np.eye(5, dtype=np.float32))
    eight = step(KEY, *over_devices(images, teacher), e_high, np.eye(5, dtype=np.float32))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5, atol=1e-5)


def test_uneven_shards_divide_by_the_global_count(logits, over_devices):
    # One slot a device, five of eight valid: a mean of per-device means would be off by 8 / 5.
    weights = np.array([1, 0, 1, 1, 0, 0, 1, 1], np.float32)
    *spread, spread_weights = over_devices(*logits, weights)
    np.testing.assert_allclose(loss(*spread, 4.0, spread_weights), loss(*logits, 4.0, weights), rtol=1e-6)


def test_bfloat16(logits):
    low = [z.astype(jnp.bfloat16) for z in logits]
    value = high_energy_kd_loss(*low, 4.0, np.ones(8, jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert value == pytest.approx(float(jax.jit(kd_loss)(*low, 4.0)), rel=1e-6)


def test_a_nan_shows_in_the_loss(select, logits):
    energy = np.array([1, np.nan, 0, 0, 0, 0, 0, 0], np.float32)
    for weights in (select(KEY, energy, 0.0, 8).weights, select(KEY, np.ones(8), np.nan, 8).weights):
        assert np.isnan(weights).all()
        assert np.isnan(loss(*logits, 4.0, weights))


@pytest.mark.usefixtures("unchecked")
def test_mistakes(logits):
    for capacity in (0, 9):
        with pytest.raises(UserError, match=rf"capacity must lie in 1\.\.8 \(the batch\), got {capacity}"):
            select_high_energy(KEY, np.ones(8), 0.0, capacity)
    with pytest.raises(UserError, match="e_high must not be NaN"):
        select_high_energy(KEY, np.ones(8), float("nan"), 2)
    with pytest.raises(UserError, match=r"high_rate must lie in \(0, 1\], got 0"):
        high_energy_capacity(0.0, 64)
    with pytest.raises(UserError, match="batch_size and slack must be positive, got 0"):
        high_energy_capacity(0.5, 0)
    with pytest.raises(UserError, match=r"weights must have the shape \[8\], got \[3\]"):
        high_energy_kd_loss(*logits, 4.0, np.ones(3))
    with pytest.raises(UserError, match="weights must be >= 0, got -1"):
        high_energy_kd_loss(*logits, 4.0, np.array([1, 1, 0, -1.0, 0, 0, 0, 0]))
    with pytest.raises(UserError, match=r"weights must have the shape \[capacity\], got \[2, 4\]"):
        high_energy_partners(KEY, np.ones((2, 4)))
