import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, mutual_info_score, normalized_mutual_info_score

from jkd.errors import UserError
from jkd.metrics import (
    agreement_counts,
    entropy,
    joint_histogram,
    mutual_information,
    normalized_mutual_information,
    predicted_class,
    prediction_agreement,
    predictive_entropy,
    predictive_kl,
)

A, B = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 2, 2])
CLASSES = arrays(np.int32, 16, elements=st.integers(0, 4))
LOGITS = arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32))
histogram = jax.jit(joint_histogram, static_argnums=2)
information = jax.jit(lambda joint: (mutual_information(joint), normalized_mutual_information(joint)))
of_table = jax.jit(lambda joint: (*information(joint), entropy(joint.sum(1)), entropy(joint.sum(0))))
counts, agreement, classes = jax.jit(agreement_counts), jax.jit(prediction_agreement), jax.jit(predicted_class)
entropies, divergences = jax.jit(predictive_entropy), jax.jit(predictive_kl)


def test_by_hand():
    a, b = np.eye(3)[A], np.eye(3)[B]
    assert np.mean(np.asarray(agreement(a, b))) == pytest.approx(0.833333, abs=1e-6)
    assert [*map(int, counts(a, b))] == [5, 0, 6]
    assert [*map(int, counts(a, b, np.arange(6) > 2))] == [2, 0, 3]
    assert of_table(histogram(A, B, 3))[0] == pytest.approx(0.780355, abs=1e-6)
    value, normalized, _, columns = of_table(histogram(A, A, 3))
    assert value == pytest.approx(1.098612, abs=1e-6)
    assert columns == pytest.approx(1.098612, abs=1e-6)
    assert normalized == pytest.approx(1, abs=1e-6)


@given(a=CLASSES, b=CLASSES)
def test_agrees_with_scikit_learn(a, b):
    joint = histogram(a, b, 5)
    np.testing.assert_array_equal(joint, confusion_matrix(a, b, labels=range(5)))
    value, normalized, rows, columns = map(float, of_table(joint))
    assert value == pytest.approx(mutual_info_score(a, b), abs=2e-6)
    assert value >= 0
    assert value <= min(rows, columns) + 1e-5
    assert normalized == pytest.approx(normalized_mutual_info_score(a, b), abs=5e-6)


@given(a=CLASSES, b=CLASSES, mask=arrays(bool, 16))
def test_tables_add_up_and_a_mask_is_a_slice(a, b, mask):
    part, rest = (np.asarray(histogram(a, b, 5, chosen)) for chosen in (mask, ~mask))
    np.testing.assert_array_equal(part, confusion_matrix(a[mask], b[mask], labels=range(5)) if mask.any() else 0)
    np.testing.assert_array_equal(part + rest, histogram(a, b, 5))


def test_what_is_no_class_is_missing_from_the_table():
    # 1 * 3 - 1 would be cell (0, 2).
    joint = joint_histogram(np.array([1, 0, 3, 2]), np.array([-1, 3, 0, 2]), 3)
    np.testing.assert_array_equal(joint, np.diag([0, 0, 1]))


def test_nan_rows_agree_with_nothing_and_are_counted():
    a = np.array([[np.nan, 1, 0], [0, 2, 1], [3, np.nan, 0], [np.inf, 0, -np.inf]], np.float32)
    found = classes(a)
    np.testing.assert_array_equal(found, [-1, 1, -1, 0])
    np.testing.assert_array_equal(agreement(a, a), [False, True, False, True])
    assert [*map(int, counts(a, a))] == [2, 2, 4]
    assert [*map(int, counts(a, np.zeros((4, 3), np.float32)))] == [1, 2, 4]
    assert np.asarray(joint_histogram(found, found, 3)).sum() == 2
    np.testing.assert_array_equal(np.isnan(entropies(a)), [True, False, True, True])
    np.testing.assert_array_equal(np.isnan(divergences(np.zeros_like(a), a)), [True, False, True, True])


def test_ties_go_to_the_lower_class():
    np.testing.assert_array_equal(classes(np.array([[1, 1, 0], [0, 2, 2.0]])), [0, 1])


@given(p=LOGITS, q=LOGITS)
def test_entropy_and_divergence_agree_with_scipy(p, q):
    own, other = (softmax(z.astype(np.float64), axis=1) for z in (p, q))
    np.testing.assert_allclose(entropies(p), stats.entropy(own, axis=1), atol=2e-5)
    np.testing.assert_allclose(divergences(p, q), stats.entropy(own, other, axis=1), rtol=1e-4, atol=5e-5)
    np.testing.assert_array_equal(divergences(p, p), 0)


def test_impossible_classes():
    possible, certain = np.array([[0, 0, -np.inf]]), np.array([[0, -np.inf, -np.inf]])
    assert entropies(possible).item() == pytest.approx(np.log(2))
    assert entropies(certain).item() == 0
    assert divergences(certain, possible).item() == pytest.approx(np.log(2))
    assert divergences(possible, certain).item() == np.inf
    assert np.isfinite(jax.jit(jax.grad(lambda z: predictive_entropy(z).sum()))(certain)).all()
    assert np.isfinite(jax.jit(jax.grad(lambda z: predictive_kl(z, possible).sum()))(certain)).all()


def test_gradients():
    p, q = np.array([[2, 0, -1.0]]), np.array([[0, 1, 1.0]])
    with jax.enable_x64(True):
        both = jax.jit(lambda p, q: predictive_kl(p, q).sum() + predictive_entropy(p).sum())
        check_grads(both, (p, q), 1, modes=["rev"])
        joint = np.array([[0.3, 0.1], [0.2, 0.4]])
        check_grads(jax.jit(lambda j: sum(information(j))), (joint,), 1, modes=["rev"])
    assert np.isfinite(jax.jit(jax.grad(mutual_information))(np.array([[1.0, 0], [0, 0]]))).all()


def test_tables_without_information():
    np.testing.assert_allclose(information(np.outer(np.arange(3), [1, 5, 2])), 0, atol=1e-6)
    # One class only: identical without any information.
    np.testing.assert_array_equal(information(np.diag([0, 7, 0])), [0, 1])
    assert np.isnan(information(np.zeros((3, 3), int))).all()
    assert np.isnan(jax.jit(entropy)(np.zeros(3)))


def test_half_precision_is_upcast_and_one_example_will_do():
    z = np.array([[1, 2, 0]], jnp.bfloat16)
    assert entropies(z).dtype == divergences(z, z).dtype == jnp.float32
    assert agreement(z, z).shape == (1,)


def test_eight_devices_equal_one(over_devices):
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 32, 5)).astype(np.float32)

    @jax.jit
    def evaluate(a, b, mask):
        joint = joint_histogram(predicted_class(a), predicted_class(b), 5, mask)
        return agreement_counts(a, b, mask), joint, mutual_information(joint)

    batch = a, b, draw.random(32) < 0.8
    for spread, one in zip(
        jax.tree.leaves(evaluate(*over_devices(*batch))), jax.tree.leaves(evaluate(*batch)), strict=True
    ):
        np.testing.assert_array_equal(spread, one)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match=r"a and b must have the same shape, got \[2, 3\] and \[2, 2\]"):
        prediction_agreement(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"logits must have the shape \[batch, classes\], got \[3\]"):
        predictive_entropy(np.zeros(3))
    with pytest.raises(UserError, match="a must be floating point, got int32"):
        agreement_counts(np.zeros((2, 3), np.int32), np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"mask must have the shape \[2\], got \[3\]"):
        agreement_counts(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(3, bool))
    with pytest.raises(UserError, match=r"pred_a and pred_b must share one shape \[batch\], got \[2\] and \[3\]"):
        joint_histogram(np.zeros(2, int), np.zeros(3, int), 4)
    with pytest.raises(UserError, match=r"num_classes must lie in \[1, 46340\], got 50000"):
        joint_histogram(A, B, 50000)
    with pytest.raises(UserError, match=r"joint must have the shape \[rows, columns\], got \[3\]"):
        mutual_information(np.ones(3))
