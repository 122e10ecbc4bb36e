import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, logsumexp, softmax

from jkd.distill import (
    batch_cosine_loss,
    class_cosine,
    cskd_loss,
    cskd_terms,
    cswt_temperature,
    energy_temperature,
)
from jkd.errors import UserError

STUDENT = np.array([[1, 0, -1], [0.5, 0.5, 2], [0, 2, 0]])
TEACHER = np.array([[2, 1, -1], [0, 1, 3], [1, 0, 0.0]])
LABELS = np.array([0, 2, 0])
LOGITS = arrays(np.float32, (4, 5), elements=st.floats(-20, 20, width=32))
whole = jax.jit(cskd_loss, static_argnames="use_cswt")
step = jax.jit(jax.value_and_grad(cskd_loss))
terms_of, cosines_of = jax.jit(cskd_terms), jax.jit(class_cosine)
loss, temperatures = jax.jit(batch_cosine_loss), jax.jit(cswt_temperature)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (2, 16, 5)).astype(np.float32)
    return logits[0], logits[1], draw.integers(0, 5, 16)


# Values worked out by hand, and an oracle.


def test_class_cosines_by_hand():
    np.testing.assert_allclose(cosines_of(STUDENT, TEACHER, 4.0), [0.979418, 0.977725, 0.993287], atol=1e-6)
    assert loss(STUDENT, TEACHER, 4.0, weight=1.0) == pytest.approx(0.264373, abs=3e-6)
    assert loss(STUDENT, TEACHER, 4.0) == pytest.approx(2 * 0.264373, abs=6e-6)


def test_weighted_temperatures_by_hand():
    chosen = temperatures(STUDENT, TEACHER)
    np.testing.assert_allclose(chosen, [2, 2.108410, 6], atol=1e-6)
    cosines = cosines_of(STUDENT, TEACHER, chosen)
    np.testing.assert_allclose(cosines, [0.981700, 0.988011, 0.989635], atol=1e-6)
    assert loss(STUDENT, TEACHER, chosen, weight=1.0) == pytest.approx(0.153852, abs=2e-6)


def test_loss_by_hand():
    with jax.enable_x64(True):
        terms = jax.tree.map(np.asarray, terms_of(STUDENT, TEACHER, LABELS))
        total = whole(STUDENT, TEACHER, LABELS)
        plain = whole(STUDENT, TEACHER, LABELS, use_cswt=False, kd_weight=0.5)
    assert np.mean(terms.cross_entropy) == pytest.approx(1.005377, abs=1e-6)
    assert total == pytest.approx(1.841827, abs=2e-6)
    assert plain == pytest.approx(1.005377 + 0.264373, abs=1e-6)
    np.testing.assert_allclose(terms.class_cosine, [0.979418, 0.977725, 0.993287], atol=1e-6)
    assert np.mean(terms.temperature) == pytest.approx(3.369470, abs=1e-6)
    assert float(terms.cosine) + float(terms.cswt) == pytest.approx(2 * (0.264373 + 0.153852), abs=2e-6)


@given(student=LOGITS, teacher=LOGITS, t=st.floats(1, 8))
def test_scipy_agrees(student, teacher, t):
    p, q = (softmax(z.astype(np.float64) / t, axis=1) for z in (student, teacher))
    expected = 2 * t**2 * np.mean([cosine(p[:, j], q[:, j]) for j in range(5)])
    found = float(loss(student, teacher, t))
    assert found == pytest.approx(expected, rel=1e-4, abs=2e-4)
    assert found >= -2e-4


@given(student=LOGITS, teacher=LOGITS)
def test_temperatures_follow_similarity(student, teacher):
    p, q = (softmax(z.astype(np.float64), axis=1) for z in (student, teacher))
    distance = np.array([cosine(*rows) for rows in zip(p, q, strict=True)])
    chosen = np.asarray(temperatures(student, teacher))
    assert chosen.min() >= 2
    assert chosen.max() <= 6
    if np.ptp(distance) > 1e-4:
        np.testing.assert_allclose(chosen, 2 + 4 * (distance - distance.min()) / np.ptp(distance), atol=0.02)
        np.testing.assert_allclose((chosen.min(), chosen.max()), (2, 6), rtol=1e-6)


# Properties.


def test_the_mean_temperature_is_squared(batch):
    student, teacher, _ = batch
    t = np.linspace(1, 7, 16, dtype=np.float32)
    cosines = np.asarray(cosines_of(student, teacher, t))
    assert loss(student, teacher, t, weight=1.0) == pytest.approx(16 * (1 - cosines.mean()), rel=1e-5)


def test_any_rule_may_choose_the_temperatures(batch):
    student, teacher, _ = batch
    energies = -4 * logsumexp(teacher / 4, axis=1)
    chosen = np.asarray(jax.jit(energy_temperature)(energies, -8.0, -6.0))
    assert len(np.unique(chosen)) > 1
    assert np.isfinite(loss(student, teacher, chosen))


def test_equal_temperatures_reproduce_the_plain_loss(batch):
    terms = terms_of(*batch, t_low=4.0, t_high=4.0)
    np.testing.assert_array_equal(terms.temperature, 4)
    assert terms.cswt == pytest.approx(float(terms.cosine), rel=1e-5)


def test_a_perfect_student(batch):
    teacher = batch[1]
    np.testing.assert_array_equal(cswt_temperature(teacher, teacher), 2)
    np.testing.assert_array_equal(cswt_temperature(teacher, teacher + 0.0, t_low=3.0), 3)
    assert loss(teacher, teacher, 4.0) == pytest.approx(0, abs=1e-5)


def test_probabilities_of_a_class_may_have_another_scale():
    p = softmax(np.random.default_rng(0).normal(size=(6, 4)), axis=1)
    scaled = p * np.array([0.5, 1, 1, 1])
    # A fifth class takes up what is left, so that all rows are probabilities.
    q, scaled = (np.c_[x, 1.5 - x.sum(1)] / 1.5 for x in (p, scaled))
    np.testing.assert_allclose(np.asarray(cosines_of(np.log(scaled), np.log(q)))[:4], 1, rtol=1e-6)


def test_shifts_and_order_do_not_matter(batch):
    student, teacher, _ = batch
    expected, chosen = np.asarray(cosines_of(student, teacher, 4.0)), np.asarray(temperatures(student, teacher))
    shift = np.linspace(-3, 3, 16, dtype=np.float32)[:, None]
    np.testing.assert_allclose(cosines_of(student + shift, teacher - shift, 4.0), expected, rtol=1e-5)
    np.testing.assert_allclose(cosines_of(student[::-1], teacher[::-1], 4.0), expected, rtol=1e-5)
    np.testing.assert_allclose(cosines_of(student[:, ::-1], teacher[:, ::-1], 4.0), expected[::-1], rtol=1e-5)
    np.testing.assert_allclose(temperatures(student[::-1], teacher[::-1]), chosen[::-1], rtol=1e-5)


def test_cross_entropy_part(batch):
    student, _, labels = batch
    expected = -log_softmax(student, axis=1)[np.arange(16), labels]
    np.testing.assert_allclose(terms_of(*batch).cross_entropy, expected, rtol=1e-5)
    assert whole(*batch, kd_weight=0.0, ce_weight=3.0) == pytest.approx(3 * expected.mean(), rel=1e-5)


# Gradients.


def test_no_gradient_reaches_the_teacher_or_the_chosen_temperatures(batch):
    student, teacher, labels = batch
    np.testing.assert_array_equal(jax.jit(jax.grad(cskd_loss, 1))(student, teacher, labels), 0)
    chosen = jax.jit(jax.grad(lambda *args: cswt_temperature(*args[:2], t_high=args[2]).sum(), (0, 1, 2)))
    for gradient in chosen(student, teacher, 6.0):
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_match_finite_differences(batch):
    student, teacher = (x[:3].astype(np.float64) for x in batch[:2])
    with jax.enable_x64(True):
        chosen = np.asarray(temperatures(student, teacher))
        check_grads(jax.jit(lambda s, t: batch_cosine_loss(s, teacher, t)), (student, chosen), order=1, modes=["rev"])
        with_rule = jax.jit(jax.grad(lambda s: batch_cosine_loss(s, teacher, cswt_temperature(s, teacher))))(student)
        frozen = jax.jit(jax.grad(batch_cosine_loss))(student, teacher, chosen)
    np.testing.assert_allclose(with_rule, frozen, rtol=1e-10)


def test_a_class_that_vanishes_has_cosine_zero():
    gone = np.array([[0, 1, -1e4], [1, 0, -1e4], [2, 0, -1e4]], np.float32)
    there = np.array([[0, 1, 0.5], [1, 0, -1], [0, 0, 1]], np.float32)
    for pair in ((gone, there), (there, gone), (gone, gone)):
        assert np.asarray(cosines_of(*pair, 4.0))[2] == 0
        value, gradient = step(*pair, np.array([0, 1, 0]))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_finite_at_the_edges(size):
    student = size * np.array([[1, -1, 0], [0, 0, 0], [-1, 1, 1]], np.float32)
    for teacher in (student, student[::-1]):
        value, gradient = step(student, teacher, LABELS)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


# Precision and transformations.


def test_half_precision_is_upcast(batch):
    student, teacher, labels = batch
    low = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    value = cskd_loss(*low, labels)
    assert value.dtype == jnp.float32
    assert float(value) == float(cskd_loss(*(z.astype(np.float32) for z in low), labels))


def test_jit_vmap_and_eight_devices(batch, over_devices):
    value, gradient = step(*batch)
    assert cskd_loss(*batch) == pytest.approx(float(value), rel=1e-5)
    placed_value, placed = step(*over_devices(*batch))
    assert placed_value == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(placed, gradient, rtol=1e-4, atol=1e-6)
    student, *rest = batch
    mapped = jax.jit(jax.vmap(lambda s: cskd_loss(s, *rest)))(np.stack([student, -student]))
    np.testing.assert_allclose(mapped, [value, step(-student, *rest)[0]], rtol=1e-5)


# Mistakes.


@pytest.mark.parametrize("function", [batch_cosine_loss, class_cosine, lambda s, t, _: cswt_temperature(s, t)])
def test_one_example_is_refused(function):
    with pytest.raises(UserError, match=r"student_logits must hold at least 2 examples, got the shape \[1, 3\]"):
        function(STUDENT[:1], TEACHER[:1], 4.0)


def test_mistakes_name_the_argument():
    with pytest.raises(UserError, match="t_low must be positive and finite, got 0"):
        cswt_temperature(STUDENT, TEACHER, t_low=0)
    with pytest.raises(UserError, match="temperature must be positive and finite, got -1"):
        batch_cosine_loss(STUDENT, TEACHER, -1.0)
    with pytest.raises(UserError, match="student_logits must have at least 2 classes"):
        class_cosine(STUDENT[:, :1], TEACHER[:, :1])


def test_nan_shows_everywhere():
    student = STUDENT.copy()
    student[1, 1] = np.nan
    for pair in ((student, TEACHER), (TEACHER, student)):
        assert np.isnan(cosines_of(*pair, 4.0)).all()
        assert np.isnan(temperatures(*pair)).all()
        assert np.isnan(whole(*pair, LABELS))
    assert np.isnan(whole(student, student, LABELS))
