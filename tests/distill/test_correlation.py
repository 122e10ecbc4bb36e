import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, spearmanr

from jkd.distill import (
    correlation_loss,
    correlation_value_loss,
    keep_most_uncertain,
    mix_teacher_logits,
    r2kd_loss,
    r2kd_terms,
    rank_correlation,
    spearman_loss,
)
from jkd.errors import UserError

STUDENT = np.array([[2, 0, 1, -1], [1, 2, 0, 3.0]])
TEACHER = np.array([[3, 1, 0, -1], [0, 2, 1, 4.0]])
PRUNED = np.array([[2, 1, 0, 0], [1, 1, 1, 3.0]])
LABELS = np.array([0, 3])
LOGITS = arrays(np.float32, (4, 5), elements=st.integers(-20, 20).map(lambda n: n / 2))
value_loss, rank_loss = jax.jit(correlation_value_loss), jax.jit(spearman_loss)
terms_of = jax.jit(r2kd_terms)
both = jax.jit(correlation_loss, static_argnames=("rank_mode", "chunk"))


rank_jit = jax.jit(rank_correlation, static_argnames="rank_mode")
step_jit = jax.jit(jax.value_and_grad(r2kd_loss), static_argnames=("rank_mode", "chunk"))


# Options that are always given: one left out makes another program.
def rank_of(student, teacher, rank_mode="hard", tau=1.0):
    return np.asarray(rank_jit(student, teacher, rank_mode=rank_mode, tau=tau))


def step(*batch, rank_mode="hard", rank_weight=2.0, **options):
    return step_jit(*batch, rank_mode=rank_mode, rank_weight=rank_weight, **options)


@functools.partial(jax.jit, static_argnames="rank_mode")
def rank_step(student, teacher, rank_mode):
    """The correlation of each example, and the gradient of their sum."""
    rho, pull = jax.vjp(lambda s: rank_correlation(s, teacher, rank_mode=rank_mode), student)
    return rho, pull(jnp.ones_like(rho))[0]


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (2, 16, 5)).astype(np.float32)
    return logits[0], logits[1], draw.integers(0, 5, 16)


# Values worked out by hand, and oracles.


def test_losses_by_hand():
    assert rank_loss(STUDENT, TEACHER) == pytest.approx(0.4, abs=1e-6)
    assert value_loss(STUDENT, TEACHER) == pytest.approx(1.023485, abs=1e-5)
    terms = terms_of(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(terms.rank_correlation, 0.8, rtol=1e-6)
    np.testing.assert_allclose(terms.sample_cosine, [0.980381, 0.985050], atol=1e-6)
    np.testing.assert_allclose(terms.class_cosine, [0.981492, 0.992357, 0.971293, 0.996061], atol=1e-6)


def test_mixed_teachers_by_hand():
    mixed = mix_teacher_logits(TEACHER, PRUNED)
    np.testing.assert_allclose(mixed, [[2.7, 1, 0, -0.7], [0.3, 1.7, 1, 3.7]], rtol=1e-6)
    assert value_loss(STUDENT, mixed) == pytest.approx(0.849005, abs=1e-5)
    assert rank_loss(STUDENT, mixed) == pytest.approx(0.4, abs=1e-6)
    np.testing.assert_array_equal(mix_teacher_logits(TEACHER, PRUNED, 1.0), TEACHER.astype(np.float32))
    np.testing.assert_allclose(mix_teacher_logits(TEACHER, TEACHER, 0.3), TEACHER, rtol=1e-6)


@given(student=LOGITS, teacher=LOGITS)
def test_scipy_agrees(student, teacher):
    p, q = (softmax(z.astype(np.float64) / 4, axis=1) for z in (student, teacher))
    expected = 32 * (
        np.mean([cosine(p[b], q[b]) for b in range(4)]) + np.mean([cosine(p[:, j], q[:, j]) for j in range(5)])
    )
    assert value_loss(student, teacher) == pytest.approx(expected, rel=1e-4, abs=2e-5)
    rho = [0 if np.ptp(s) == 0 or np.ptp(t) == 0 else spearmanr(s, t)[0] for s, t in zip(student, teacher, strict=True)]
    assert rank_loss(student, teacher) == pytest.approx(2 - 2 * np.mean(rho), abs=1e-5)


@pytest.mark.parametrize("rank_mode", ["hard", "soft"])
def test_the_extremes_of_rank_correlation(rank_mode):
    rows = np.tile(np.array([3, 1, 0, -2, 7], np.float32), (16, 1))
    np.testing.assert_allclose(rank_of(rows, rows, rank_mode, tau=0.01), 1, atol=1e-6)
    np.testing.assert_allclose(rank_of(-rows, rows, rank_mode, tau=0.01), -1, atol=1e-6)


def test_sharp_soft_ranks_are_the_hard_ones(batch):
    hard, soft = rank_of(*batch[:2]), rank_of(*batch[:2], rank_mode="soft", tau=1e-4)
    np.testing.assert_allclose(soft, hard, atol=1e-4)


# Properties.


def test_the_loss_is_the_sum_of_its_parts(batch):
    student, teacher, labels = batch
    soft = {"rank_mode": "soft", "tau": 0.5}
    rest = 3 * float(value_loss(student, teacher, weight=1.0, temperature=2.0))
    rest += 5 * (1 - rank_of(student, teacher, **soft).mean())
    options = {"temperature": 2.0, "value_weight": 3.0, "rank_weight": 5.0, **soft}
    assert both(student, teacher, **options) == pytest.approx(rest, rel=1e-5)
    total = rest - 0.5 * log_softmax(student, axis=1)[np.arange(16), labels].mean()
    assert step(*batch, ce_weight=0.5, **options)[0] == pytest.approx(total, rel=1e-5)


def test_a_perfect_student(batch):
    assert both(batch[1], batch[1]) == pytest.approx(0, abs=1e-5)


def test_ranks_see_neither_temperature_nor_scale(batch):
    student, teacher, _ = batch
    for rank_mode in ("hard", "soft"):
        one = rank_of(student, teacher, rank_mode=rank_mode)
        np.testing.assert_allclose(rank_of(7 * student + 3, teacher, rank_mode=rank_mode), one, atol=1e-5)


def test_order_does_not_matter(batch):
    student, teacher, labels = batch
    expected = step(*batch, rank_mode="soft")[0]
    assert step(student[::-1], teacher[::-1], labels[::-1], rank_mode="soft")[0] == pytest.approx(
        float(expected), rel=1e-5
    )
    moved = step(student[:, ::-1], teacher[:, ::-1], 4 - labels, rank_mode="soft")[0]
    assert moved == pytest.approx(float(expected), rel=1e-5)


def test_one_example_has_no_class_term():
    cos = jax.tree.map(np.asarray, terms_of(STUDENT[:1], TEACHER[:1], LABELS[:1]))
    np.testing.assert_allclose(cos.class_cosine, 1, rtol=1e-6)
    expected = 32 * (1 - float(cos.sample_cosine[0]))
    assert value_loss(STUDENT[:1], TEACHER[:1]) == pytest.approx(expected, abs=2e-5)


def test_temperatures_of_examples(batch):
    t = np.linspace(1, 7, 16, dtype=np.float32)
    terms = jax.tree.map(np.asarray, terms_of(*batch, temperature=t))
    expected = 16 * (2 - terms.sample_cosine.mean() - terms.class_cosine.mean())
    assert value_loss(*batch[:2], temperature=t, weight=1.0) == pytest.approx(expected, rel=1e-5)


# Gradients.


def test_hard_ranks_train_nothing(batch):
    np.testing.assert_array_equal(rank_step(*batch[:2], rank_mode="hard")[1], 0)
    with_ranks, without = (step(*batch, rank_weight=weight)[1] for weight in (2.0, 0.0))
    np.testing.assert_array_equal(with_ranks, without)
    assert np.abs(rank_step(*batch[:2], rank_mode="soft")[1]).min() > 0


def test_no_gradient_reaches_the_teachers(batch):
    student, teacher, labels = batch

    def loss(full, pruned):
        return r2kd_loss(student, mix_teacher_logits(full, pruned), labels, rank_mode="soft")

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(teacher, -teacher):
        np.testing.assert_array_equal(gradient, 0)
    for rank_mode in ("hard", "soft"):
        function = jax.jit(jax.grad(lambda t, mode=rank_mode: correlation_loss(student, t, rank_mode=mode)))
        np.testing.assert_array_equal(function(teacher), 0)


def test_gradients_match_finite_differences(batch):
    with jax.enable_x64(True):
        student, teacher, labels = batch[0][:3].astype(np.float64), batch[1][:3], batch[2][:3]
        loss = jax.jit(jax.value_and_grad(lambda s: r2kd_loss(s, teacher, labels, rank_mode="soft", chunk=2)))
        gradient = np.asarray(loss(student)[1])
        steps = 1e-6 * np.eye(15).reshape(15, 3, 5)
        slopes = [(float(loss(student + h)[0]) - float(loss(student - h)[0])) / 2e-6 for h in steps]
    np.testing.assert_allclose(gradient, np.reshape(slopes, (3, 5)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank_mode", ["hard", "soft"])
def test_degenerate_rows(rank_mode):
    rows = np.array([[0] * 5, [0.1] * 5, [1e4, -1e4, 0, 1e4, 0], [-1e4, 1e4, 1e4, 0, 0]], np.float32)
    student, teacher = np.repeat(rows, 4, 0), np.tile(rows, (4, 1))
    value, gradient = step(student, teacher, np.arange(16) % 5, rank_mode=rank_mode)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    rho, gradient = (np.asarray(x) for x in rank_step(student, teacher, rank_mode=rank_mode))
    np.testing.assert_array_equal(rho[:8], 0)
    np.testing.assert_array_equal(gradient[:8], 0)
    assert np.isfinite(gradient).all()


# Precision and transformations.


def test_precision_chunks_vmap_and_eight_devices(batch, over_devices):
    expected, gradient = step(*batch, rank_mode="soft")
    low = [x.astype(jnp.bfloat16) for x in batch[:2]]
    assert jax.eval_shape(functools.partial(r2kd_loss, rank_mode="soft"), *low, batch[2]).dtype == jnp.float32
    assert r2kd_loss(*batch, rank_mode="soft") == pytest.approx(float(expected), rel=1e-5)
    chunks = step(*batch, rank_mode="soft", chunk=3)
    np.testing.assert_allclose(chunks[1], gradient, rtol=1e-4, atol=1e-6)
    assert chunks[0] == pytest.approx(float(expected), rel=1e-5)
    value, placed = step(*over_devices(*batch), rank_mode="soft")
    assert value == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(placed, gradient, rtol=1e-4, atol=1e-6)
    seeds = np.stack([batch[0], -batch[0]])
    mapped = jax.jit(jax.vmap(lambda s: r2kd_loss(s, *batch[1:], rank_mode="soft")))(seeds)
    np.testing.assert_allclose(mapped, [step(s, *batch[1:], rank_mode="soft")[0] for s in seeds], rtol=1e-5)


# Uncertain examples.


@pytest.mark.parametrize(("share", "count"), [(1.0, 16), (0.5, 8), (0.01, 1), (0.15, 2)])
def test_the_most_uncertain_are_kept(batch, share, count):
    found = keep_most_uncertain(batch[1], share)
    order = np.argsort(-entropy(softmax(batch[1], axis=1), axis=1))
    np.testing.assert_array_equal(found, order[:count])


def test_nan_is_kept_and_shows(batch):
    teacher = batch[1].copy()
    teacher[7, 1] = np.nan
    assert np.asarray(keep_most_uncertain(teacher, 0.1))[0] == 7


# Mistakes.


@pytest.mark.usefixtures("unchecked")
def test_mistakes(batch):
    with pytest.raises(UserError, match="Unknown rank_mode 'sharp'.* Known: hard, soft"):
        spearman_loss(STUDENT, TEACHER, rank_mode="sharp")
    with pytest.raises(UserError, match="student_logits must have at least 2 classes"):
        spearman_loss(STUDENT[:, :1], TEACHER[:, :1])
    with pytest.raises(UserError, match="tau must be positive"):
        jax.eval_shape(lambda s: r2kd_loss(s, TEACHER, LABELS, rank_mode="soft", tau=0.0), STUDENT)
    with pytest.raises(UserError, match=r"teacher_weight must lie in \[0, 1\], got 1.5"):
        mix_teacher_logits(TEACHER, PRUNED, 1.5)
    with pytest.raises(UserError, match=r"full and pruned must have the same shape, got \[2, 4\] and \[1, 4\]"):
        mix_teacher_logits(TEACHER, PRUNED[:1])
    for share in (0.0, 1.1, np.nan):
        with pytest.raises(UserError, match=r"share must lie in \(0, 1\]"):
            keep_most_uncertain(TEACHER, share)


@pytest.mark.parametrize("rank_mode", ["hard", "soft"])
def test_nan_is_not_hidden_by_ranks(batch, rank_mode):
    student, teacher, labels = batch
    bad = student.copy()
    bad[1, 2] = np.nan
    for pair in ((bad, teacher), (teacher, bad)):
        np.testing.assert_array_equal(np.isnan(rank_of(*pair, rank_mode=rank_mode)), np.arange(16) == 1)
        assert np.isnan(step(*pair, labels, rank_mode=rank_mode)[0])
