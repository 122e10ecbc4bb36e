import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy.special import softmax

from jkd.distill import (
    cross_entropy,
    dkd_loss,
    dkd_terms,
    energy_dkd_loss,
    energy_dkd_terms,
    energy_kd_loss,
    energy_kd_terms,
    energy_score,
    energy_temperature,
    energy_thresholds,
    kd_loss,
)
from jkd.errors import UserError

TEACHER = np.array([[8, 0, 0], [2, 1, 0], [0.5, 0.4, 0.3], [4, 3, -1]])
STUDENT = np.array([[4, 1, 0], [1, 1, 0], [0, 1, 0], [1, 2, 0.0]])
LABELS = np.array([0, 0, 1, 1])
ENERGIES = np.array([-8.958179, -5.477352, -4.795282, -6.901113])
E_LOW, E_HIGH = -6.901113, -5.477352
LOGITS = arrays(np.float32, (4, 3), elements=st.floats(-50, 50, width=32))
# For shapes of their own; what is compared bit for bit is called eagerly, always with the same shape.
score, rule = jax.jit(energy_score), jax.jit(energy_temperature)
cut = jax.jit(energy_thresholds, static_argnums=(1, 2))
terms_of = jax.jit(energy_kd_terms)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (2, 16, 5)).astype(np.float32)
    return logits[0], logits[1], draw.integers(0, 5, 16)


@pytest.fixture(scope="module")
def thresholds(batch):
    return energy_thresholds(energy_score(batch[1]), 0.25, 0.25)


@pytest.fixture(params=[energy_kd_loss, energy_dkd_loss])
def loss(request):
    return request.param


# Values worked out by hand.


def test_energies_by_hand():
    np.testing.assert_allclose(score(TEACHER), ENERGIES, atol=1e-6)
    np.testing.assert_allclose(score(np.zeros(3)), -4.394449, atol=1e-6)
    np.testing.assert_allclose(score(TEACHER, 0.01), [-8, -2, -0.5, -4], atol=1e-6)


def test_thresholds_and_temperatures_by_hand():
    low, high = cut(ENERGIES, 0.25, 0.25)
    assert (float(low), float(high)) == pytest.approx((E_LOW, E_HIGH), abs=1e-6)
    np.testing.assert_array_equal(rule(ENERGIES, low, high), [6, 4, 2, 4])
    reversed_rule = rule(ENERGIES, low, high, t_low=6.0, t_high=2.0)
    np.testing.assert_array_equal(reversed_rule, [2, 4, 6, 4])


def test_kd_at_energy_temperatures_by_hand():
    with jax.enable_x64(True):
        low, high = map(float, cut(score(TEACHER), 0.25, 0.25))
        terms = terms_of(STUDENT, TEACHER, LABELS, low, high, t_low=2.0, t_high=6.0)
        mid = terms_of(STUDENT, TEACHER, LABELS, low, high, t_low=4.0, t_high=4.0)
    np.testing.assert_array_equal(terms.temperature, [6, 4, 2, 4])
    np.testing.assert_allclose(terms.energy, ENERGIES, atol=1e-6)
    np.testing.assert_allclose(terms.kd, [2.486011, 0.119818, 0.120278, 1.068695], atol=1e-6)
    assert np.asarray(terms.kd).mean() == pytest.approx(0.948700, abs=1e-6)
    np.testing.assert_allclose(mid.kd, [2.091421, 0.119818, 0.117599, 1.068695], atol=1e-6)
    assert np.asarray(mid.kd).mean() == pytest.approx(0.849383, abs=1e-6)
    single = terms_of(STUDENT, TEACHER, LABELS, np.float32(low), np.float32(high))
    # T^2 KL in float32: the rounding of KL grows with T^2.
    np.testing.assert_allclose(single.kd, terms.kd, atol=5e-6)


def test_loss_by_hand():
    student, teacher = np.array([[1, 0, -1], [0.5, 0.5, 2]]), np.array([[2, 1, -1], [0, 1, 3.0]])
    value = jax.jit(energy_kd_loss)(student, teacher, np.array([0, 2]), -100.0, 100.0)
    assert value == pytest.approx(0.159334, abs=1e-6)


def test_losses_are_the_weighted_sum_of_their_parts(batch, thresholds):
    student, teacher, labels = batch
    terms = energy_kd_terms(*batch, *thresholds, t_low=1.0)
    value = energy_kd_loss(*batch, *thresholds, t_low=1.0, ce_weight=0.3, kd_weight=2.0, reduction="none")
    parts = [np.asarray(part) for part in (terms.cross_entropy, terms.kd)]
    np.testing.assert_allclose(value, 0.3 * parts[0] + 2 * parts[1], rtol=1e-6)
    np.testing.assert_allclose(terms.cross_entropy, cross_entropy(student, labels, reduction="none"))
    warm_up = jax.jit(optax.linear_schedule(0.0, 1.0, 20))
    for epoch, scale in ((0, 0.0), (5, 0.25), (40, 1.0)):
        value = energy_dkd_loss(*batch, *thresholds, t_low=1.0, beta=6.0, kd_weight=warm_up(epoch))
        soft = dkd_loss(student, teacher, labels, terms.temperature, beta=6.0)
        assert value == pytest.approx(parts[0].mean() + scale * float(soft), rel=1e-6)


def test_decoupled_parts_are_taken_at_the_temperatures_of_the_rule(batch, thresholds):
    terms = energy_dkd_terms(*batch, *thresholds, t_low=1.0)
    rule = energy_kd_terms(*batch, *thresholds, t_low=1.0)
    for name in ("cross_entropy", "energy", "temperature"):
        np.testing.assert_array_equal(getattr(terms, name), getattr(rule, name))
    assert set(np.unique(terms.temperature)) == {1, 4, 6}
    expected = dkd_terms(*batch, rule.temperature)
    np.testing.assert_array_equal(terms.tckd, expected.tckd)
    np.testing.assert_array_equal(terms.nckd, expected.nckd)


# Properties.


@given(logits=LOGITS, temperature=st.floats(0.1, 20))
def test_energy_bounds(logits, temperature):
    energy, top = np.asarray(score(logits, temperature)), logits.max(-1)
    rounding = 1e-5 * (np.abs(top) + temperature)
    assert np.all(energy <= -top + rounding)
    assert np.all(energy >= -top - temperature * np.log(3) - rounding)


def test_energy_moves_with_the_logits(batch):
    np.testing.assert_allclose(energy_score(batch[1] + 3), np.asarray(energy_score(batch[1])) - 3, atol=1e-5)
    assert jax.eval_shape(energy_score, np.zeros((2, 3, 5))).shape == (2, 3)


def test_energy_does_not_overflow():
    logits = np.array([[1e4, 0], [-1e4, -1e4]], np.float32)
    np.testing.assert_allclose(score(logits), [-1e4, 1e4 - 4 * np.log(2)], rtol=1e-6)


def test_energy_gradient_is_minus_softmax(batch):
    gradient = jax.jit(jax.grad(lambda z: energy_score(z).sum()))
    np.testing.assert_allclose(gradient(batch[1]), -softmax(batch[1] / 4, axis=1), atol=1e-6)
    with jax.enable_x64(True):
        wide = batch[1].astype(np.float64)
        np.testing.assert_allclose(gradient(wide), -softmax(wide / 4, axis=1), rtol=1e-12)


@given(
    energies=arrays(np.float32, 50, elements=st.integers(-1000, 1000).map(float), unique=True),
    percents=st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda p: sum(p) <= 100),
)
def test_thresholds_select_exactly_the_share(energies, percents):
    low, high = map(float, energy_thresholds(energies, percents[0] / 100, percents[1] / 100))
    assert np.sum(energies < low) == 50 * percents[0] // 100
    assert np.sum(energies > high) == 50 * percents[1] // 100


def test_rates_are_counted_as_written():
    # 0.29 * 100 is 28.999999999999996 and 0.9 + 0.1 may round to more than 1.
    def found(count, *rates):
        return tuple(map(float, energy_thresholds(np.arange(float(count)), *rates)))

    assert found(100, 0.29, 0.71) == (29, 28)
    assert found(50, 0.9, 0.1) == (45, 44)
    assert found(50, 1.0, 0.0) == (np.inf, 49)
    assert found(50, 0.0, 1.0) == (0, -np.inf)


def test_no_groups_without_rates_or_differences():
    for energies, rate in ((ENERGIES, 0.0), (np.full(4, -3.0), 0.5)):
        low, high = cut(energies, rate, rate)
        np.testing.assert_array_equal(rule(energies, low, high), 4)


def test_low_wins_between_crossed_thresholds():
    np.testing.assert_array_equal(rule(np.full(4, 0.5), 1.0, 0.0), 6)


def test_equal_temperatures_reproduce_kd_bit_for_bit(batch, thresholds):
    student, teacher, labels = batch
    same = {"t_low": 4.0, "t_mid": 4.0, "t_high": 4.0}
    terms = energy_kd_terms(*batch, *thresholds, **same)
    np.testing.assert_array_equal(terms.kd, kd_loss(student, teacher, 4.0, reduction="none"))
    only_kd = energy_kd_loss(*batch, *thresholds, **same, ce_weight=0.0, kd_weight=1.0)
    np.testing.assert_array_equal(only_kd, kd_loss(student, teacher, 4.0))
    only_dkd = energy_dkd_loss(*batch, *thresholds, **same, ce_weight=0.0)
    np.testing.assert_array_equal(only_dkd, dkd_loss(student, teacher, labels, 4.0))


def test_the_student_does_not_choose_the_temperature(batch, thresholds):
    student, teacher, labels = batch
    moved = energy_kd_terms(student - 100, teacher, labels, *thresholds)
    np.testing.assert_array_equal(moved.temperature, energy_kd_terms(*batch, *thresholds).temperature)


def test_order_of_the_batch_does_not_matter(loss, batch, thresholds):
    order = np.random.default_rng(1).permutation(16)
    shuffled = loss(*(x[order] for x in batch), *thresholds, reduction="none")
    np.testing.assert_array_equal(shuffled, np.asarray(loss(*batch, *thresholds, reduction="none"))[order])


# Gradients.


def test_no_gradient_reaches_the_teacher_or_the_temperature(loss, batch, thresholds):
    student, teacher, labels = batch
    low, high = thresholds

    def total(teacher, energies, t):
        rule = energy_temperature(energies, low, high).sum()
        return loss(student, teacher, labels, low, high, t_high=t) + rule

    for gradient in jax.jit(jax.grad(total, (0, 1, 2)))(teacher, energy_score(teacher), 6.0):
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_match_finite_differences(loss, batch, thresholds):
    with jax.enable_x64(True):
        student, teacher, labels = batch[0].astype(np.float64), *batch[1:]
        function = jax.jit(lambda s: loss(s, teacher, labels, *thresholds))
        check_grads(function, (student,), order=1, modes=["rev"])


def test_finite_at_the_edges(loss):
    edges = np.array([[1e4, -1e4, 0], [0, 0, 0], [-1e4, 1e4, 1e4]], np.float32)
    student, teacher = np.repeat(edges, 3, 0), np.tile(edges, (3, 1))
    value, gradient = jax.jit(jax.value_and_grad(loss))(student, teacher, np.arange(9) % 3, -8.0, -4.0)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


# Precision and transformations.


def test_half_precision_is_upcast(loss, batch, thresholds):
    student, teacher, labels = batch
    low = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    value = loss(*low, labels, *thresholds)
    assert value.dtype == jnp.float32
    assert float(value) == float(loss(*(z.astype(np.float32) for z in low), labels, *thresholds))
    assert energy_score(low[1]).dtype == jnp.float32


def test_float64_stays():
    with jax.enable_x64(True):
        assert score(TEACHER).dtype == jnp.float64
        low, high = cut(ENERGIES, 0.25, 0.25)
        assert (float(low), float(high)) == (E_LOW, E_HIGH)
        assert jax.eval_shape(energy_kd_loss, STUDENT, TEACHER, LABELS, low, high).dtype == jnp.float64


def test_jit_vmap_and_eight_devices_equal_one(loss, batch, thresholds, over_devices):
    student, teacher, labels = batch
    eager = loss(*batch, *thresholds)
    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(*batch, *thresholds)
    assert value == pytest.approx(float(eager), rel=1e-6)
    sharded_value, sharded_gradient = step(*over_devices(*batch), *thresholds)
    assert len(sharded_gradient.sharding.device_set) == 8
    np.testing.assert_allclose(sharded_value, value, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-6, atol=1e-6)
    mapped = jax.jit(jax.vmap(lambda s: loss(s, teacher, labels, *thresholds)))
    seeds = np.stack([student, -student])
    np.testing.assert_allclose(mapped(seeds), [loss(s, *batch[1:], *thresholds) for s in seeds], rtol=1e-6)


def test_thresholds_of_a_sharded_pass(batch, over_devices):
    energies = np.asarray(energy_score(batch[1]))
    (spread,) = over_devices(energies)
    assert [*map(float, cut(spread, 0.25, 0.5))] == [*map(float, energy_thresholds(energies, 0.25, 0.5))]


# Mistakes.


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0.7, 0.4, "must be at most 1, got 0.7"),
        (-0.1, 0.2, r"low_rate must lie in \[0, 1\], got -0.1"),
        (0.0, 1.5, r"high_rate must lie in \[0, 1\], got 1.5"),
        (float("nan"), 0.2, "low_rate must lie in"),
    ],
)
def test_bad_rates(low, high, message):
    with pytest.raises(UserError, match=message):
        energy_thresholds(ENERGIES, low, high)


def test_bad_energies_and_thresholds():
    for bad in (np.nan, np.inf, -np.inf):
        energies = np.append(ENERGIES, bad)
        with pytest.raises(UserError, match="energies must be finite, got 1 NaN or infinite"):
            energy_thresholds(energies, 0.2, 0.2)
        assert np.isnan(cut(energies, 0.2, 0.2)).all()
    with pytest.raises(UserError, match="at least one"):
        energy_thresholds(np.zeros(0), 0.2, 0.2)
    with pytest.raises(UserError, match="e_high must not be NaN"):
        energy_temperature(ENERGIES, 0.0, np.nan)


def test_bad_temperatures(loss):
    with pytest.raises(UserError, match="t_mid must be positive"):
        jax.eval_shape(lambda s: loss(s, TEACHER, LABELS, E_LOW, E_HIGH, t_mid=0.0), STUDENT)
    with pytest.raises(UserError, match="temperature must be positive"):
        energy_score(TEACHER, -1.0)


def test_comparisons_do_not_hide_a_nan():
    np.testing.assert_array_equal(rule(np.array([-1, np.nan, -1, -1.0]), -2.0, 0.0), [4, np.nan, 4, 4])
    assert np.isnan(rule(ENERGIES, np.nan, 0.0)).all()
    assert np.isnan(rule(ENERGIES, 0.0, np.nan)).all()


@pytest.mark.usefixtures("unchecked")
def test_static_faults(loss):
    with pytest.raises(UserError, match=r"same shape, got \[4, 3\] and \[3, 3\]"):
        loss(STUDENT, TEACHER[:3], LABELS, E_LOW, E_HIGH)
    with pytest.raises(UserError, match=r"e_low must be a scalar, got the shape \[4\]"):
        loss(STUDENT, TEACHER, LABELS, np.zeros(4), E_HIGH)
    with pytest.raises(UserError, match="logits must be floating point, got int32"):
        energy_score(TEACHER.astype(np.int32))
    with pytest.raises(UserError, match=r"energies must have the shape \[examples\].*got \[2, 2\]"):
        energy_thresholds(ENERGIES.reshape(2, 2), 0.2, 0.2)
