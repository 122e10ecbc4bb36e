import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jkd.errors import UserError
from jkd.metrics import per_class_counts, topk_correct

# Small integers: many ties.
LOGITS = arrays(np.float32, (8, 5), elements=st.integers(-2, 2).map(float))
LABELS = arrays(np.int32, 8, elements=st.integers(0, 4))


@pytest.fixture
def unchecked():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def topk():
    return jax.jit(topk_correct, static_argnums=2)


def test_topk_by_hand():
    logits = np.array([[1, 3, 2], [1, 3, 2], [1, 3, 2.0]])
    labels = np.array([0, 1, 2])
    np.testing.assert_array_equal(topk_correct(logits, labels), [False, True, False])
    np.testing.assert_array_equal(topk_correct(logits, labels, 2), [False, True, True])
    np.testing.assert_array_equal(topk_correct(logits, labels, 3), True)


def test_ties_go_by_index():
    for label, places in ((0, [True, True, True]), (1, [False, True, True]), (2, [False, False, True])):
        for k, expected in zip((1, 2, 3), places, strict=True):
            assert topk_correct(np.zeros((1, 3)), np.array([label]), k)[0] == expected


@given(logits=LOGITS, labels=LABELS, k=st.integers(1, 5))
def test_agrees_with_top_k(topk, logits, labels, k):
    # lax.top_k puts -0 behind 0; here they are equal numbers.
    places = jax.lax.top_k(logits + 0.0, k)[1]
    np.testing.assert_array_equal(topk(logits, labels, k), np.any(places == labels[:, None], axis=1))


@given(logits=LOGITS, labels=LABELS)
def test_top_1_is_argmax(topk, logits, labels):
    np.testing.assert_array_equal(topk(logits, labels, 1), logits.argmax(1) == labels)


def test_nan_and_unknown_labels_are_wrong(topk):
    logits = np.array([[np.nan, 5, 0], [5, np.nan, 0], [5, 0, 1], [5, 0, 1], [np.inf, 0, -np.inf]], np.float32)
    labels = np.array([1, 0, -1, 3, 0])
    for k in (1, 3):
        np.testing.assert_array_equal(topk(logits, labels, k), [False, False, False, False, True])
    assert topk(np.array([[np.inf, 0, -np.inf]]), np.array([2]), 3)[0]


def test_topk_of_bfloat16_and_small_labels(topk):
    logits = jnp.array([[1, 2], [2, 1]], jnp.bfloat16)
    np.testing.assert_array_equal(topk(logits, np.array([1, 1], np.uint8), 1), [True, False])


def test_counts_by_hand():
    counts = per_class_counts(
        np.array([True, False, True, True]),
        np.array([0, 0, 2, 2]),
        4,
        mask=np.array([True, True, True, False]),
    )
    np.testing.assert_array_equal(counts.correct, [1, 0, 1, 0])
    np.testing.assert_array_equal(counts.total, [2, 0, 1, 0])
    assert counts.total.dtype == jnp.int32


def test_labels_outside_are_in_no_class():
    counts = per_class_counts(np.ones(3, bool), np.array([-1, 1, 2]), 2)
    np.testing.assert_array_equal(counts.total, [0, 1])


@given(labels=LABELS, correct=arrays(bool, 8), mask=arrays(bool, 8))
def test_counts_add_up_and_a_mask_is_a_slice(labels, correct, mask):
    masked = per_class_counts(correct, labels, 5, mask)
    np.testing.assert_array_equal(masked.total, np.bincount(labels[mask], minlength=5))
    np.testing.assert_array_equal(masked.correct, np.bincount(labels[mask & correct], minlength=5))
    rest = per_class_counts(correct, labels, 5, ~mask)
    both = jax.tree.map(jnp.add, masked, rest)
    jax.tree.map(np.testing.assert_array_equal, both, per_class_counts(correct, labels, 5))


def test_eight_devices_equal_one():
    draw = np.random.default_rng(0)
    batch = draw.normal(size=(32, 5)).astype(np.float32), draw.integers(0, 5, 32), draw.random(32) < 0.8

    @jax.jit
    def evaluate(logits, labels, mask):
        return per_class_counts(topk_correct(logits, labels, 2), labels, 5, mask)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    jax.tree.map(np.testing.assert_array_equal, evaluate(*spread), evaluate(*batch))


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match=r"k must lie in 1\.\.3 \(the number of classes\), got 5"):
        topk_correct(np.zeros((2, 3)), np.zeros(2, int), 5)
    with pytest.raises(UserError, match=r"labels \[batch\], got \[2, 3\] and \[3\]"):
        topk_correct(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(UserError, match=r"share one shape \[batch\], got \{'correct': \[2\], 'labels': \[3\]\}"):
        per_class_counts(np.ones(2, bool), np.zeros(3, int), 4)
    with pytest.raises(UserError, match=r"'mask': \[1\]"):
        per_class_counts(np.ones(2, bool), np.zeros(2, int), 4, np.ones(1, bool))
    with pytest.raises(UserError, match="num_classes must be positive, got 0"):
        per_class_counts(np.ones(2, bool), np.zeros(2, int), 0)
