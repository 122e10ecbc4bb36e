import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jkd.distill import cross_entropy, optimal_gap, smooth_labels
from jkd.errors import UserError

LOGITS = np.array([[2, 0, -1, 1], [0, 3, 1, 0.0]])
LABELS = np.array([0, 1])
smoothed = jax.jit(lambda z, y, s: cross_entropy(z, y, smoothing=s, reduction="none"))


def test_labels_by_hand():
    np.testing.assert_allclose(
        smooth_labels(LABELS, 4, 0.1), [[0.925, 0.025, 0.025, 0.025], [0.025, 0.925, 0.025, 0.025]]
    )
    np.testing.assert_array_equal(smooth_labels(LABELS, 4, 0.0), np.eye(4)[:2])
    np.testing.assert_array_equal(smooth_labels(LABELS, 4, 1), np.full((2, 4), 0.25))


@pytest.mark.parametrize(
    ("smoothing", "values"),
    [(0.0, [0.440190, 0.210998]), (0.1, [0.590190, 0.410998]), (1.0, [1.940190, 2.210998])],
)
def test_cross_entropy_by_hand(smoothing, values):
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, smoothing=smoothing, reduction="none"), values, atol=1e-6)
    # A traced smoothing takes the other way to the same number.
    np.testing.assert_allclose(smoothed(LOGITS, LABELS, smoothing), values, atol=1e-6)
    assert cross_entropy(LOGITS, LABELS, smoothing=smoothing) == pytest.approx(np.mean(values), abs=1e-6)


def test_excluded_classes_are_fine_without_smoothing():
    logits = np.array([[0, -np.inf, 0.0]])
    assert cross_entropy(logits, np.array([0])) == pytest.approx(np.log(2))
    assert np.isfinite(jax.jit(jax.grad(lambda z: cross_entropy(z, np.array([0]), smoothing=0)))(logits)).all()


def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(0, 4, (32, 7)), draw.integers(0, 7, 32)
    for smoothing in (0.0, 0.1, 0.7):
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing, reduction="none"
        )
        with jax.enable_x64(True):
            ours = cross_entropy(logits, labels, smoothing=smoothing, reduction="none")
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_gradients():
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda z, s: cross_entropy(z, LABELS, smoothing=s)), (LOGITS, 0.1), 1, modes=["rev"])
    edges = np.array([[1e4, -1e4, 0, 0], [0, 0, 0, 0]], np.float32)
    assert np.isfinite(jax.jit(jax.grad(lambda z: cross_entropy(z, LABELS, smoothing=0.1)))(edges)).all()


def test_half_precision_is_upcast():
    value = cross_entropy(LOGITS.astype(jnp.bfloat16), LABELS, smoothing=0.1)
    assert value.dtype == jnp.float32
    assert value == pytest.approx(0.500594, abs=1e-6)


def test_eight_devices_equal_one(over_devices):
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(16, 4)).astype(np.float32), draw.integers(0, 4, 16)
    np.testing.assert_allclose(smoothed(*over_devices(logits, labels), 0.1), smoothed(logits, labels, 0.1), rtol=1e-6)


@pytest.mark.parametrize(("classes", "gap"), [(10, 4.510860), (200, 7.496097), (1000, 9.105091)])
def test_optimal_gap_by_hand(classes, gap):
    assert optimal_gap(classes, 0.1) == pytest.approx(gap, abs=2e-6)


def test_the_optimal_gap_is_where_the_gradient_vanishes():
    logits = jnp.zeros((1, 10)).at[0, 3].set(optimal_gap(10, 0.1))
    gradient = jax.jit(jax.grad(lambda z: cross_entropy(z, np.array([3]), smoothing=0.1)))(logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    for temperature, p in ((1, 0.910000), (2, 0.514547), (3, 0.333232), (64, 0.106525)):
        assert jax.nn.softmax(logits / temperature)[0, 3] == pytest.approx(p, abs=2e-6)
    assert optimal_gap(10, 0) == np.inf
    assert optimal_gap(10, 1.0) == 0


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    for smoothing in (-0.1, 1.1, np.nan):
        with pytest.raises(UserError, match=r"smoothing must lie in \[0, 1\]"):
            cross_entropy(LOGITS, LABELS, smoothing=smoothing)
        with pytest.raises(UserError, match=r"smoothing must lie in \[0, 1\]"):
            optimal_gap(10, smoothing)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 3\], got 0 to 4"):
        smooth_labels(np.array([0, 4]), 4, 0.1)
    with pytest.raises(UserError, match=r"labels must have the shape \[batch\], got \[2, 1\]"):
        smooth_labels(LABELS[:, None], 4, 0.1)
    with pytest.raises(UserError, match="labels must be integers, got float32"):
        smooth_labels(LABELS.astype(np.float32), 4, 0.1)
    with pytest.raises(UserError, match="num_classes must be at least 2, got 1"):
        smooth_labels(np.array([0]), 1, 0.1)
    with pytest.raises(UserError, match=r"smoothing must be a scalar, got the shape \[2\]"):
        cross_entropy(LOGITS, LABELS, smoothing=np.array([0.1, 0.2]))


def test_traced_faults_show_as_nan():
    rows = jax.jit(lambda y: smooth_labels(y, 4, 0.1))(np.array([-1, 4, 2]))
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), [True, True, False])
    np.testing.assert_array_equal(np.isnan(smoothed(LOGITS, np.array([-1, 2]), 0.1)), [True, False])
