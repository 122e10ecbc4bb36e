import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

from jkd.distill import cross_entropy, dkd_loss, dkd_terms, kd_loss
from jkd.errors import UserError

STUDENT = np.array([[1, 0, -1], [0.5, 0.5, 2]])
TEACHER = np.array([[2, 1, -1], [0, 1, 3.0]])
LABELS = np.array([0, 2])
LOGITS = arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32))
# name -> loss(student, teacher, labels, temperature, reduction)
LOSSES = {
    "ce": lambda s, t, y, T, r="mean": cross_entropy(s, y, reduction=r),
    "kd": lambda s, t, y, T, r="mean": kd_loss(s, t, T, reduction=r),
    "dkd": lambda s, t, y, T, r="mean": dkd_loss(s, t, y, T, reduction=r),
}
STEPS = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in LOSSES.items()}
# For shapes of their own; what is compared bit for bit is called eagerly, always with the same shape.
ce = jax.jit(cross_entropy, static_argnames="reduction")
kd = jax.jit(kd_loss, static_argnames="reduction")
dkd, dkd_parts = jax.jit(dkd_loss, static_argnames="reduction"), jax.jit(dkd_terms)


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture(params=LOSSES)
def step(request):
    """(student, teacher, labels, temperature) -> (value, gradient), jitted."""
    return STEPS[request.param]


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (2, 16, 5)).astype(np.float32)
    return logits[0], logits[1], draw.integers(0, 5, 16), draw.choice([2.0, 4.0, 6.0], 16).astype(np.float32)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# Values worked out by hand.


def test_cross_entropy_by_hand():
    assert ce(STUDENT, LABELS) == pytest.approx(0.388294, abs=1e-6)


@pytest.mark.parametrize(("temperature", "value"), [(1, 0.051249), (3.0, 0.125192), (4.0, 0.133894)])
def test_kd_by_hand(temperature, value):
    assert kd(STUDENT, TEACHER, float(temperature)) == pytest.approx(value, abs=1e-6)


def test_kd_of_two_teachers_by_hand():
    second = np.array([[0, 2, 0], [1, 0, 1.0]])
    both = jax.jit(jax.vmap(lambda teacher: kd_loss(STUDENT, teacher, 3.0)))(np.stack([TEACHER, second]))
    assert np.mean(np.asarray(both)) == pytest.approx(0.319390, abs=1e-6)


def test_kd_at_high_temperature_compares_centered_logits():
    with jax.enable_x64(True):
        value = kd(STUDENT, TEACHER, 1e4)
    assert value == pytest.approx(0.152778, abs=2e-5)
    difference = STUDENT - TEACHER
    centered = difference - difference.mean(1, keepdims=True)
    assert np.mean(np.sum(centered**2, 1)) / 6 == pytest.approx(0.152778, abs=1e-6)


def test_dkd_by_hand():
    # Teacher (1/2, 1/4, 1/4) and (1/5, 3/5, 1/5), student uniform.
    teacher = np.log(np.array([[2, 1, 1], [1, 3, 1.0]]))
    terms = dkd_parts(np.zeros((2, 3)), teacher, np.array([0, 0]), 1.0)
    np.testing.assert_allclose(terms.tckd, [0.058892, 0.043693], atol=1e-6)
    np.testing.assert_allclose(terms.nckd, [0, 0.130812], atol=1e-6)
    value = dkd(np.zeros((2, 3)), teacher, np.array([0, 0]), 1.0, alpha=2.0, beta=5.0)
    assert value == pytest.approx((2 * 0.102585 + 5 * 0.130812) / 2, abs=3e-6)


def test_dkd_keeps_the_digits_of_a_nearly_certain_student():
    # 1 - q_y is 2 exp(-100): far below what 1 - q_y computed from q_y could show.
    terms = dkd_parts(np.array([[100, 0, 0.0]]), np.zeros((1, 3)), np.array([0]), 1.0)
    expected = np.log(1 / 3) / 3 + 2 / 3 * (np.log(2 / 3) - np.log(2) + 100)
    assert terms.tckd.item() == pytest.approx(expected, rel=1e-6)
    assert terms.nckd.item() == 0


def test_dkd_leaves_the_target_out_where_lowering_it_would_not():
    # The target leads by 5000: lowered by 1000 it would still take the whole softmax.
    terms = dkd_parts(np.array([[5000, 1, 0.0]]), np.array([[5000, 0, 1.0]]), np.array([0]), 1.0)
    p = 1 / (1 + np.exp(1))
    assert terms.nckd.item() == pytest.approx((1 - 2 * p) * 1.0, rel=1e-6)


# Identities and invariances.


def test_dkd_parts_make_up_kd(batch):
    student, teacher, labels, t = batch
    terms = dkd_terms(student, teacher, labels, t)
    p_target = softmax(teacher / t[:, None])[np.arange(16), labels]
    made_up = np.asarray(terms.tckd) + (1 - p_target) * np.asarray(terms.nckd)
    np.testing.assert_allclose(made_up, kd_loss(student, teacher, t, reduction="none"), rtol=2e-5)


def test_two_classes_have_no_nontarget_part(batch):
    student, teacher, _, t = batch
    # Called eagerly: where XLA fuses the operations, the non-target part is 0 up to rounding only.
    terms = dkd_terms(student[:, :2], teacher[:, :2], np.arange(16) % 2, t)
    np.testing.assert_array_equal(terms.nckd, 0)
    np.testing.assert_allclose(
        terms.tckd, kd(student[:, :2], teacher[:, :2], t, reduction="none"), rtol=1e-4, atol=1e-6
    )


@given(student=LOGITS, teacher=LOGITS, temperature=st.floats(0.5, 20))
def test_divergences_are_not_negative_and_zero_at_equality(student, teacher, temperature):
    rounding = 1e-5 * temperature**2
    labels = np.arange(4)
    terms = dkd_parts(student, teacher, labels, temperature)
    for values in (kd(student, teacher, temperature, reduction="none"), terms.tckd, terms.nckd):
        assert np.all(np.asarray(values) >= -rounding)
    np.testing.assert_array_equal(kd(student, student, temperature, reduction="none"), 0)
    np.testing.assert_array_equal(dkd(student, student, labels, temperature, reduction="none"), 0)


def test_order_of_the_batch_does_not_matter(loss, batch):
    order = np.random.default_rng(1).permutation(16)
    np.testing.assert_array_equal(loss(*(x[order] for x in batch), "none"), np.asarray(loss(*batch, "none"))[order])


def test_a_constant_added_to_logits_does_not_matter(loss, batch):
    student, teacher, labels, t = batch
    moved = loss(student + 7, teacher - 5, labels, t, "none")
    np.testing.assert_allclose(moved, loss(*batch, "none"), rtol=2e-5, atol=2e-5)


def test_scalar_temperature_equals_one_for_each_example(loss, batch):
    student, teacher, labels, _ = batch
    for temperature in (4, 4.0, np.float32(4), np.array(4.0), jnp.array(4.0)):
        one = loss(student, teacher, labels, temperature, "none")
        np.testing.assert_array_equal(one, loss(student, teacher, labels, np.full(16, 4.0), "none"))


def test_reductions(loss, batch):
    values = np.asarray(loss(*batch, "none"))
    assert values.shape == (16,)
    assert loss(*batch, "sum") == pytest.approx(values.sum(), rel=1e-6)
    assert loss(*batch, "mean") == pytest.approx(values.mean(), rel=1e-6)
    with pytest.raises(UserError, match="Unknown reduction 'avg'"):
        loss(*batch, "avg")


# Gradients.


def test_kd_gradient_is_the_difference_of_probabilities(batch):
    student, teacher, _, t = batch
    gradient = jax.jit(jax.grad(kd_loss))(student, teacher, t)
    expected = t[:, None] * (softmax(student / t[:, None]) - softmax(teacher / t[:, None])) / 16
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_gradients_match_finite_differences(loss, batch):
    with jax.enable_x64(True):
        student, teacher, labels, t = (x[:3] for x in batch)
        student, teacher, t = (x.astype(np.float64) for x in (student, teacher, t))
        check_grads(jax.jit(lambda s: loss(s, teacher, labels, t)), (student,), order=1, modes=["rev"])


def test_a_learned_temperature_gets_its_gradient_from_both_sides(batch):
    student, teacher = batch[:2]
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda t: kd_loss(student, teacher, t)), (3.0,), order=1, modes=["rev"])


def test_no_gradient_reaches_the_teacher(loss, batch):
    student, teacher, labels, t = batch
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda z: loss(student, z, labels, t)))(teacher), 0)


EDGES = np.array(
    [[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0], [0, 0, 0, 0], [1e4, 1e4, 1e4, 1e4], [-1e4, 0, 0, 1e4]], np.float32
)


@pytest.mark.parametrize("temperature", [0.1, 4.0])
def test_values_and_gradients_are_finite_at_the_edges(step, temperature):
    student, teacher, labels = (
        np.reshape(x, (100, -1))
        for x in np.broadcast_arrays(EDGES[:, None, None], EDGES[None, :, None], np.arange(4)[None, None, :, None])
    )
    value, gradient = step(student, teacher, labels[:, 0], temperature)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_batch_of_one(loss, batch):
    value, gradient = jax.jit(jax.value_and_grad(loss))(*(x[:1] for x in batch))
    assert value == pytest.approx(np.asarray(loss(*batch, "none"))[0], rel=1e-6)
    assert np.isfinite(gradient).all()


# Precision and transformations.


def test_half_precision_is_upcast(loss, batch):
    student, teacher, labels, t = batch
    for dtype in (jnp.bfloat16, jnp.float16):
        low = student.astype(dtype), teacher.astype(dtype)
        value = loss(*low, labels, t, "none")
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, loss(*(z.astype(np.float32) for z in low), labels, t, "none"))


def test_float64_stays():
    p, q = softmax(TEACHER / 4), softmax(STUDENT / 4)
    with jax.enable_x64(True):
        values = {name: jax.jit(loss)(STUDENT, TEACHER, LABELS, 4.0) for name, loss in LOSSES.items()}
    assert {value.dtype for value in values.values()} == {jnp.dtype("float64")}
    assert values["kd"] == pytest.approx(16 * np.mean(np.sum(p * np.log(p / q), 1)), rel=1e-13)


def test_jit_and_vmap_over_seeds_equal_an_eager_loop(loss, batch):
    student, *rest = batch
    seeds = np.stack([student, student[::-1], -student])
    one = jax.jit(loss)
    mapped = jax.jit(jax.vmap(lambda s: loss(s, *rest)))(seeds)
    eager = [loss(s, *rest) for s in seeds]
    np.testing.assert_allclose([one(s, *rest) for s in seeds], eager, rtol=1e-6)
    np.testing.assert_allclose(mapped, eager, rtol=1e-6)


def test_eight_devices_equal_one(step, batch, over_devices):
    value, gradient = step(*over_devices(*batch))
    assert len(gradient.sharding.device_set) == 8
    one_value, one_gradient = step(*batch)
    np.testing.assert_allclose(value, one_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, one_gradient, rtol=1e-6, atol=1e-6)


# Mistakes.


@pytest.mark.usefixtures("unchecked")
def test_static_faults_name_the_shapes():
    with pytest.raises(UserError, match=r"same shape, got \[2, 3\] and \[2, 2\]"):
        kd_loss(STUDENT, TEACHER[:, :2], 4.0)
    with pytest.raises(UserError, match=r"same shape, got \[2, 3\] and \[1, 3\]"):
        jax.jit(dkd_loss)(STUDENT, TEACHER[:1], LABELS, 4.0)
    with pytest.raises(UserError, match=r"student_logits must have the shape \[batch, classes\], got \[3\]"):
        kd_loss(STUDENT[0], TEACHER[0], 4.0)
    with pytest.raises(UserError, match="student_logits must have at least 2 classes"):
        cross_entropy(STUDENT[:, :1], LABELS)
    with pytest.raises(UserError, match="teacher_logits must be floating point, got int32"):
        kd_loss(STUDENT, TEACHER.astype(np.int32), 4.0)
    with pytest.raises(UserError, match=r"temperature must be a scalar or have the shape \[2\], got \[3\]"):
        kd_loss(STUDENT, TEACHER, np.ones(3))


@pytest.mark.usefixtures("unchecked")
def test_wrong_labels():
    with pytest.raises(UserError, match=r"labels must have the shape \[2\].*got \[1\]"):
        cross_entropy(STUDENT, LABELS[:1])
    with pytest.raises(UserError, match="labels must be integers, got float32"):
        dkd_loss(STUDENT, TEACHER, LABELS.astype(np.float32), 4.0)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 2\], got -1 to 0"):
        cross_entropy(STUDENT, np.array([-1, 0]))


@pytest.mark.parametrize("bad", [-1, 0.0, np.nan, np.inf, np.float32(-2), jnp.array(0.0), np.array([1, -1.0])])
def test_bad_temperatures(bad):
    with pytest.raises(UserError, match="temperature must be positive and finite"):
        kd_loss(STUDENT, TEACHER, bad)
    with pytest.raises(UserError, match="temperature must be positive and finite"):
        jax.jit(lambda s: dkd_loss(s, TEACHER, LABELS, bad))(STUDENT)


def test_traced_faults_show_as_nan():
    for labels in ([-1, 2], [3, 2]):
        labels = np.array(labels)
        for values in (
            ce(STUDENT, labels, reduction="none"),
            dkd(STUDENT, TEACHER, labels, 4.0, reduction="none"),
        ):
            np.testing.assert_array_equal(np.isnan(values), [True, False])
    assert np.isnan(kd(STUDENT, TEACHER, np.nan))
    assert np.isnan(kd(np.where(STUDENT > 1, np.nan, STUDENT), TEACHER, 4.0))
