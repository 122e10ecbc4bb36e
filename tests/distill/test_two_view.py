import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import softmax

from jkd.distill import (
    batch_correlation_loss,
    batch_cosine_loss,
    class_correlation_loss,
    cskd_two_view_loss,
    cskd_two_view_terms,
    cswt_temperature,
)
from jkd.errors import UserError

loss_jit = jax.jit(cskd_two_view_loss, static_argnames="mask_mode")
step_jit = jax.jit(jax.value_and_grad(cskd_two_view_loss, (0, 1, 2, 3)), static_argnames="mask_mode")
temperatures, cosine_loss = jax.jit(cswt_temperature), jax.jit(batch_cosine_loss)
class_loss, example_loss = jax.jit(class_correlation_loss), jax.jit(batch_correlation_loss)


# The mode is always given: left out, it makes another program.
def loss(*batch, mask_mode="scale", **options):
    return loss_jit(*batch, mask_mode=mask_mode, **options)


def step(*batch, mask_mode="scale"):
    return step_jit(*batch, mask_mode=mask_mode)


@pytest.fixture(scope="module")
def batch():
    """Weak and strong logits of student and teacher, and labels."""
    draw = np.random.default_rng(0)
    return *draw.normal(0, 3, (4, 16, 5)).astype(np.float32), draw.integers(0, 5, 16)


def cos(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))


def correlations(student, teacher, t):
    """1 - cosine of the rows of both Gram matrices, in loops: for each class, for each example."""
    p, q = (softmax(z.astype(np.float64) / np.reshape(t, (-1, 1)), axis=1) for z in (student, teacher))
    return tuple(
        np.array([1 - cos(*([a[i] @ b for b in a] for a in pair)) for i in range(len(pair[0]))])
        for pair in ((p.T, q.T), (p, q))
    )


def cosine_part(student, teacher, t, rows=slice(None)):
    p, q = (softmax(z.astype(np.float64) / np.reshape(t, (-1, 1)), axis=1)[rows] for z in (student, teacher))
    return 2 * np.mean(t) ** 2 * (1 - np.mean([cos(p[:, j], q[:, j]) for j in range(p.shape[1])]))


@pytest.mark.parametrize("t", [4.0, np.linspace(1, 6, 16, dtype=np.float32)])
def test_correlations_match_loops(batch, t):
    by_class, by_example = correlations(batch[0], batch[2], t)
    assert class_loss(batch[0], batch[2], t) == pytest.approx(by_class.mean(), abs=1e-6)
    assert example_loss(batch[0], batch[2], t) == pytest.approx(by_example.mean(), abs=1e-6)


@pytest.mark.parametrize("mode", ["scale", "select"])
def test_the_recipe_in_loops(batch, mode):
    weak, strong, teacher, teacher_strong, labels = batch
    chosen = np.asarray(temperatures(weak, teacher))
    p = softmax(teacher, axis=1)
    examples = p.max(1) <= np.percentile(p.max(1), 50)
    classes = p.sum(0) <= np.percentile(p.sum(0), 50)
    assert (examples.sum(), classes.sum()) == (8, 3)
    expected = 0.0
    for t in (np.full(16, 4.0), chosen):
        by_class, by_example = correlations(weak, teacher, t)
        if mode == "scale":
            parts = (0.5 * cosine_part(weak, teacher, t), 0.6 * by_class.mean(), 0.5 * by_example.mean())
        else:
            rows = cosine_part(weak, teacher, t, examples)
            parts = (0.5 * rows, by_class[classes].sum() / 5, by_example[examples].sum() / 16)
        expected += sum(parts) + cosine_part(strong, teacher_strong, t)
    log_p = [np.log(softmax(z, axis=1))[np.arange(16), labels] for z in (weak, strong)]
    expected -= log_p[0].mean() + log_p[1].mean()
    assert loss(*batch, mask_mode=mode) == pytest.approx(expected, rel=1e-4)


def test_weights_and_terms(batch):
    both = jax.jit(lambda *batch: (cskd_two_view_terms(*batch, weight=3.0), cswt_temperature(batch[0], batch[2])))
    terms, chosen = jax.tree.map(np.asarray, both(*batch))
    np.testing.assert_array_equal(terms.temperature, chosen)
    strong = sum(float(cosine_loss(batch[1], batch[3], t, weight=3.0)) for t in (4.0, terms.temperature))
    assert terms.cosine_strong == pytest.approx(strong, rel=1e-5)
    weights = {"ce_weight": 0.5, "kd_weight": 2.0, "correlation_weight": 5.0}
    expected = 0.5 * (terms.cross_entropy_weak + terms.cross_entropy_strong).mean()
    expected += 2 * (terms.cosine_weak + terms.cosine_strong)
    expected += 5 * (terms.class_correlation + terms.batch_correlation)
    assert loss(*batch, weight=3.0, **weights) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("mode", ["scale", "select"])
def test_gradients(batch, mode):
    value, gradients = step(*batch, mask_mode=mode)
    assert np.isfinite(value)
    # Of both students, of neither teacher.
    assert [np.any(np.asarray(part)) for part in gradients] == [True, True, False, False]
    same = np.zeros((16, 5), np.float32)
    value, gradients = step(same, same, same, same, batch[-1], mask_mode=mode)
    assert np.isfinite(value)
    assert all(np.isfinite(part).all() for part in gradients)


def test_correlation_gradients_match_finite_differences(batch):
    with jax.enable_x64(True):
        student = batch[0][:3].astype(np.float64)
        for function in (class_correlation_loss, batch_correlation_loss):
            one = jax.jit(lambda s, f=function: f(s, batch[2][:3], 4.0))
            check_grads(one, (student,), order=1, modes=["rev"])


def test_order_precision_and_eight_devices(batch, over_devices):
    expected = loss(*batch)
    assert loss(*(x[::-1] for x in batch)) == pytest.approx(float(expected), rel=1e-5)
    assert step(*over_devices(*batch))[0] == pytest.approx(float(expected), rel=1e-5)
    rounded = loss(*(x.astype(jnp.bfloat16) for x in batch[:4]), batch[4])
    assert rounded.dtype == jnp.float32
    assert rounded == pytest.approx(float(expected), rel=0.05)


@pytest.mark.usefixtures("unchecked")
def test_mistakes(batch):
    weak, strong, teacher, teacher_strong, labels = batch
    with pytest.raises(UserError, match="Unknown mask_mode 'scaled'. Did you mean 'scale'"):
        cskd_two_view_loss(*batch, mask_mode="scaled")
    with pytest.raises(UserError, match=r"student_strong and teacher_strong must have the same shape"):
        cskd_two_view_loss(weak, strong[:8], teacher, teacher_strong, labels)
    with pytest.raises(UserError, match=r"student_weak and student_strong .* got \[16, 5\] and \[8, 5\]"):
        cskd_two_view_loss(weak, strong[:8], teacher, teacher_strong[:8], labels)
    with pytest.raises(UserError, match="student_logits must hold at least 2 examples"):
        class_correlation_loss(weak[:1], teacher[:1], 4.0)
    with pytest.raises(UserError, match="student_weak must hold at least 2 examples"):
        cskd_two_view_loss(*(x[:1] for x in batch))


@pytest.mark.parametrize("mode", ["scale", "select"])
def test_nan_shows(batch, mode):
    for spoiled in range(4):
        views = [x.copy() for x in batch[:4]]
        views[spoiled][3, 2] = np.nan
        assert np.isnan(loss(*views, batch[4], mask_mode=mode))
