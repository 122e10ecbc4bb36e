import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jkd.distill import (
    dkd_loss,
    dkd_terms,
    energy_kd_loss,
    ensemble_kd_loss,
    ensemble_kd_terms,
    kd_loss,
    over_teachers,
    teacher_mean_logits,
)
from jkd.errors import UserError

STUDENT = np.array([[1, 0, -1], [0.5, 0.5, 2]])
TEACHERS = np.array([[[2, 1, -1], [0, 1, 3.0]], [[0, 2, 0], [1, 0, 1.0]]])
LABELS = np.array([0, 2])


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_one_teacher_by_hand():
    assert ensemble_kd_loss(STUDENT, TEACHERS[:1], LABELS) == pytest.approx(0.283053, abs=1e-6)


def test_two_teachers_by_hand():
    assert ensemble_kd_loss(STUDENT, TEACHERS, LABELS) == pytest.approx(0.360732, abs=1e-6)
    assert over_teachers(kd_loss, STUDENT, TEACHERS, 3.0) == pytest.approx(0.319390, abs=1e-6)
    terms = ensemble_kd_terms(STUDENT, TEACHERS, LABELS)
    assert terms.cross_entropy.mean() == pytest.approx(0.388294, abs=1e-6)
    np.testing.assert_allclose(terms.kd.mean(axis=1), [0.125192, 2 * 0.319390 - 0.125192], atol=2e-6)


def test_neither_mean_logits_nor_mean_probabilities_are_the_target():
    assert kd_loss(STUDENT, teacher_mean_logits(TEACHERS), 3.0) == pytest.approx(0.111719, abs=1e-6)
    mixed = 3 * np.log(softmax(TEACHERS / 3).mean(0))
    assert kd_loss(STUDENT, mixed, 3.0) == pytest.approx(0.099455, abs=1e-6)
    gradient = jax.jit(jax.grad(lambda z: over_teachers(kd_loss, z, TEACHERS, 3.0)))(STUDENT)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(kd_loss))(STUDENT, mixed, 3.0), atol=1e-6)


def test_any_loss_goes_over_teachers():
    def class_cosine(student, teacher):  # a whole-batch scalar
        return 1 - jnp.sum(student * teacher) / (jnp.linalg.norm(student) * jnp.linalg.norm(teacher))

    student, teachers = (z.astype(np.float32) for z in (STUDENT, TEACHERS))
    losses = {
        "scalar": lambda t: class_cosine(student, t),
        "none": lambda t: dkd_loss(student, t, LABELS, 4.0, beta=2.0, reduction="none"),
        "energy": lambda t: energy_kd_loss(student, t, LABELS, -3.0, -2.0),
    }

    def means():
        return {
            "scalar": over_teachers(class_cosine, student, teachers),
            "none": over_teachers(dkd_loss, student, teachers, LABELS, 4.0, beta=2.0, reduction="none"),
            "energy": over_teachers(energy_kd_loss, student, teachers, LABELS, -3.0, -2.0),
        }

    found, loop = jax.jit(means)(), jax.jit(lambda: {n: [f(t) for t in teachers] for n, f in losses.items()})()
    for name, values in loop.items():
        np.testing.assert_allclose(found[name], np.mean(values, axis=0), rtol=1e-5)
    terms = jax.jit(lambda: over_teachers(dkd_terms, student, teachers, LABELS, 4.0))()
    assert terms.tckd.shape == terms.nckd.shape == (2,)


def test_gradients():
    t = np.array([2.0, 4.0])
    with jax.enable_x64(True):
        loss = jax.jit(lambda z, t: ensemble_kd_loss(z, TEACHERS, LABELS, temperature=t))
        check_grads(loss, (STUDENT, t), 1, modes=["rev"])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda z: ensemble_kd_loss(STUDENT, z, LABELS)))(TEACHERS), 0)
    edges = np.array([[[1e4, -1e4, 0], [0, 0, 0]]], np.float32)
    assert np.isfinite(jax.jit(jax.grad(lambda z: ensemble_kd_loss(z, edges, LABELS)))(-edges[0])).all()


def test_order_of_teachers_reductions_and_precision():
    loss = jax.jit(ensemble_kd_loss, static_argnames="reduction")
    each = loss(STUDENT, TEACHERS, LABELS, reduction="none")
    np.testing.assert_allclose(each, loss(STUDENT, TEACHERS[::-1], LABELS, reduction="none"), rtol=1e-6)
    np.testing.assert_allclose(each, ensemble_kd_loss(STUDENT, TEACHERS, LABELS, reduction="none"), rtol=1e-6)
    assert ensemble_kd_loss(STUDENT, TEACHERS, LABELS, reduction="sum") == pytest.approx(float(each.sum()), rel=1e-6)
    one = ensemble_kd_loss(STUDENT[:1], TEACHERS[:, :1], LABELS[:1])
    assert one == pytest.approx(float(each[0]), rel=1e-6)
    low = ensemble_kd_loss(STUDENT.astype(jnp.bfloat16), TEACHERS.astype(jnp.bfloat16), LABELS)
    assert (low.dtype, teacher_mean_logits(TEACHERS.astype(jnp.bfloat16)).dtype) == (jnp.float32, jnp.float32)
    assert low == pytest.approx(0.360732, abs=1e-6)


def test_eight_devices_equal_one(over_devices):
    draw = np.random.default_rng(0)
    student, teachers, labels = draw.normal(size=(16, 4)), draw.normal(size=(16, 3, 4)), draw.integers(0, 4, 16)
    batch = student.astype(np.float32), teachers.astype(np.float32), labels
    step = jax.jit(jax.value_and_grad(lambda s, t, y: ensemble_kd_loss(s, t.swapaxes(0, 1), y)))
    value, gradient = step(*over_devices(*batch))
    one_value, one_gradient = step(*batch)
    np.testing.assert_allclose(value, one_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, one_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    stacked = r"teacher_logits must have the shape \[teachers, batch, classes\] with at least one teacher, got "
    for call in (
        lambda t: over_teachers(kd_loss, STUDENT, t, 3.0),
        lambda t: ensemble_kd_loss(STUDENT, t, LABELS),
        teacher_mean_logits,
    ):
        with pytest.raises(UserError, match=stacked + r"\[2, 3\]"):
            call(TEACHERS[0])
        with pytest.raises(UserError, match=stacked + r"\[0, 2, 3\]"):
            call(TEACHERS[:0])
    with pytest.raises(UserError, match=r"same shape, got \[2, 3\] and \[1, 3\]"):
        ensemble_kd_loss(STUDENT, TEACHERS[:, :1], LABELS)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 2\]"):
        ensemble_kd_loss(STUDENT, TEACHERS, np.array([0, 3]))
    with pytest.raises(UserError, match="temperature must be positive"):
        ensemble_kd_loss(STUDENT, TEACHERS, LABELS, temperature=0.0)
    with pytest.raises(UserError, match="Unknown reduction"):
        ensemble_kd_loss(STUDENT, TEACHERS, LABELS, reduction="avg")
