import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkd import data
from jkd.errors import UserError


def make(counts, seed=0, name="set"):
    """A set with counts[k] examples of class k, shuffled; pixel 0 holds the row number."""
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.RandomState(seed).shuffle(labels)
    images = np.zeros((len(labels), 2, 3, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels)) % 256
    return data.from_arrays(images, labels, num_classes=len(counts), name=name)


def counts_of(dataset):
    return np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()


def test_read_and_labels_follow_the_rows():
    whole = make([5, 7])
    part = whole.subset([8, 3]).subset([1])
    batch = part.read(np.array([0]))
    assert whole.shape == (2, 3, 1)
    assert batch["image"][0, 0, 0, 0] == 3
    assert batch["label"].tolist() == [whole.labels[3]] == part.labels.tolist()
    assert part.labels.dtype == batch["label"].dtype == np.int32
    assert part.arrays is whole.arrays
    assert part.indices.tolist() == [3]
    assert len(part) == 1
    assert part.nbytes == whole.nbytes == 12 * 6


def test_take_and_its_limits():
    assert make([5, 7]).take(3).indices.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"count must be in \[1, 12\] for 'set', got 13"):
        make([5, 7]).take(13)


def test_per_class():
    part = make([5, 7]).per_class(4, seed=1)
    assert counts_of(part) == [4, 4]
    assert (np.diff(part.indices) > 0).all()
    assert part.indices.tolist() != make([5, 7]).per_class(4, seed=2).indices.tolist()
    with pytest.raises(UserError, match="Class 0 of 'set' has 5 examples, asked for 6"):
        make([5, 7]).per_class(6)


def test_long_tail_counts_by_hand():
    # 5000 * 100^(-k/9), rounded down: the published counts of CIFAR-10-LT, 12,406 in all.
    cifar10 = make([5000] * 10).long_tail(100, seed=0)
    assert counts_of(cifar10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    # ... and of CIFAR-100-LT.
    assert len(make([500] * 100).long_tail(100)) == 10847
    # 8 * 4^(-k/2) = 8, 4, 2, where class 1 has only 3 left.
    assert counts_of(make([8, 3, 8]).long_tail(4)) == [8, 3, 2]
    assert counts_of(make([8, 8]).long_tail(1)) == [8, 8]


def test_long_tail_errors():
    with pytest.raises(UserError, match=r"imbalance_factor must be >= 1.*got 0.5"):
        make([5, 5]).long_tail(0.5)
    with pytest.raises(UserError, match="1 class"):
        make([5]).long_tail(2)


@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    share=st.floats(0.2, 0.8),
    stratified=st.booleans(),
)
def test_split_is_a_partition(counts, share, stratified):
    whole = make(counts)
    size = round(share * len(whole))
    if not 0 < size < len(whole):
        return
    first, second = whole.split(share, seed=3, stratified=stratified)
    assert len(first) == size
    assert sorted([*first.indices, *second.indices]) == list(range(len(whole)))
    again, _ = whole.split(size, seed=3, stratified=stratified)
    assert again.indices.tolist() == first.indices.tolist()
    if stratified:
        quota = np.array(counts) * size / len(whole)
        assert (np.abs(np.array(counts_of(first)) - quota) < 1).all()


def test_split_depends_on_the_seed_and_refuses_empty_parts():
    whole = make([20, 20])
    assert whole.split(10, seed=0)[0].indices.tolist() != whole.split(10, seed=1)[0].indices.tolist()
    for first in (0, 40, 0.001, 1.0):
        with pytest.raises(UserError, match="The first part of 'set' must leave examples to both parts"):
            whole.split(first)


def test_concat_offsets_classes():
    a, b = make([2, 3], name="a"), make([4, 1, 1], name="b").subset([5, 0])
    joined = data.concat([a, b])
    assert joined.name == "a+b"
    assert joined.num_classes == 5
    assert joined.labels.tolist() == [*a.labels, *(b.labels + 2)]
    assert joined.indices.tolist() == list(range(7))
    np.testing.assert_array_equal(
        joined.read(np.array([5, 1]))["image"],
        np.concatenate([b.read(np.array([0]))["image"], a.read(np.array([1]))["image"]]),
    )


def test_concat_needs_one_shape():
    odd = data.from_arrays(np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1, int), name="odd")
    with pytest.raises(UserError, match=r"one image shape, got: set \(2, 3, 1\), odd \(4, 4, 1\)"):
        data.concat([make([1, 1]), odd])
    with pytest.raises(UserError, match="got: none"):
        data.concat([])


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.zeros((2, 4, 4, 1)), np.zeros(2, int), r"must be uint8\[N, H, W, C\], got float64\[2, 4, 4, 1\]"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), r"got uint8\[2, 4, 4\]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), r"2 images but labels of shape \[3\]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 5]), r"in \[0, 3\), got 0 to 5"),
    ],
)
def test_from_arrays_errors(image, label, message):
    with pytest.raises(UserError, match=message):
        data.from_arrays(image, label, num_classes=3)


def test_blank_sets_have_shapes_without_memory():
    made = data.blank(1_281_167, (224, 224, 3), 1000)
    source = data.source(made, 4, seed=0)
    assert isinstance(source, data.StreamSource)
    batch = source.batch(10**5)
    assert batch["image"].shape == (4, 224, 224, 3)
    assert not np.asarray(batch["image"]).any()
    assert len(made) == 1_281_167
    small = data.blank(100, (8, 8, 1), 10)
    assert isinstance(data.source(small, 4, seed=0), data.MemorySource)
    np.testing.assert_array_equal(np.bincount(small.labels), [10] * 10)
