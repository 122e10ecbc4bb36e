import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jkd import data
from jkd.data.rows import ArrayRows
from jkd.errors import UserError


def rows_of(dataset, seed, steps, batch_size):
    source = data.MemorySource(dataset, batch_size, seed)
    return np.concatenate([source.local(t)["index"] for t in range(steps)])


def make(size):
    images = np.random.RandomState(1).randint(0, 256, (size, 4, 4, 1)).astype(np.uint8)
    return data.from_arrays(images, np.arange(size) % 3, num_classes=3)


@pytest.fixture(scope="module")
def digits():
    return make(23)


@given(st.integers(0, 2**40), st.integers(0, 50), st.sampled_from([4, 8, 24, 64]))
def test_batch_is_a_function_of_seed_and_step(seed, t, batch_size):
    dataset = make(23)
    later = data.MemorySource(dataset, batch_size, seed)
    for step in (t + 3, 0, t + 1):  # another history
        later.local(step)
    fresh = data.MemorySource(dataset, batch_size, seed)
    np.testing.assert_array_equal(fresh.local(t)["index"], later.local(t)["index"])


@given(st.integers(0, 2**40), st.sampled_from([1, 4, 8, 60]))
def test_every_epoch_sees_every_example_once(seed, batch_size):
    seen = rows_of(make(23), seed, -(-3 * 23 // batch_size), batch_size)
    for epoch in range(3):
        assert sorted(seen[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_epochs_and_seeds_differ(digits):
    first, second = np.split(rows_of(digits, 0, 2, 23), 2)
    assert (first != second).any()
    assert (first != rows_of(digits, 1, 1, 23)).any()


@pytest.mark.parametrize("kind", [data.MemorySource, data.StreamSource])
@pytest.mark.parametrize("processes", [2, 4])
def test_process_slices_make_the_global_batch(digits, kind, processes):
    source = kind(digits, 8, 5)
    for t in (0, 2, 7):  # step 2 crosses into the next epoch
        parts = [source.local(t, rows) for rows in np.split(np.arange(8), processes)]
        for name, values in source.local(t).items():
            assert len(parts[0][name]) == 8 // processes
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
            np.testing.assert_array_equal(source.local(t, np.array([1, 4, 6]))[name], values[[1, 4, 6]])


def test_memory_and_stream_give_the_same_batches(tfds_dir):
    memory, disk = (data.load("cifar100", data_dir=tfds_dir, in_memory=m) for m in (True, False))
    subset = np.arange(39, 5, -2)
    for seed in (None, 3):
        resident = data.source(memory.subset(subset), 8, seed)
        streamed = data.source(disk.subset(subset), 8, seed)
        assert isinstance(resident, data.MemorySource)
        assert isinstance(streamed, data.StreamSource)
        ahead = streamed.iterate(1, 5)
        for t, crossed in zip(range(1, 5), ahead, strict=True):
            expected = resident.batch(t)
            assert set(expected) == set(crossed) == {"image", "label", "index"}
            for name, values in expected.items():
                assert values.dtype == crossed[name].dtype
                np.testing.assert_array_equal(values, crossed[name])
                np.testing.assert_array_equal(values, streamed.batch(t)[name])


def test_batch_holds_rows_of_the_loaded_set(digits):
    part = digits.subset([20, 4, 11, 9])
    batch = data.source(part, 4, seed=1).batch(0)
    assert sorted(batch["index"].tolist()) == [4, 9, 11, 20]
    np.testing.assert_array_equal(batch["image"], digits.arrays["image"][batch["index"]])
    np.testing.assert_array_equal(batch["label"], digits.labels[batch["index"]])
    assert (batch["image"].dtype, batch["label"].dtype, batch["index"].dtype) == ("uint8", "int32", "int32")


def test_sources_of_one_set_share_what_is_resident(digits):
    first, second = data.source(digits.take(9), 4, 0), data.source(digits, 8, 1)
    assert first.resident is second.resident
    assert first.assemble is second.assemble is first.in_order().assemble
    assert first._resident_on_device() is second._resident_on_device()
    assert first.prefetch == 0
    streamed = data.source(digits, 8, resident="stream", prefetch=2)
    assert streamed.resident == {}
    assert streamed.prefetch == 2
    assert streamed.assemble is data.StreamSource(digits, 4).assemble
    hash(first.assemble)


@pytest.mark.parametrize("resident", ["device", "stream"])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_in_order_is_one_padded_pass(digits, resident, batch_size):
    part = digits.subset(np.arange(22, 2, -1))
    source = data.source(part, 4, 9, resident=resident).in_order(batch_size)
    assert source.num_examples == 20
    assert source.num_batches == -(-20 // batch_size)
    index = np.concatenate([local["index"] for local in source.iterate(0, source.num_batches)])
    assert index[:20].tolist() == part.indices.tolist()
    assert len(index) == source.num_batches * batch_size
    assert set(index[20:]) <= set(part.indices)
    assert data.source(part, 4, 9, resident=resident).in_order().batch_size == 4


def test_assemble_under_a_sharded_batch_equals_the_plain_one(digits):
    source = data.MemorySource(digits, 16, 2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    resident = jax.device_put(source.resident, NamedSharding(mesh, PartitionSpec()))
    crossed = jax.device_put(source.local(3), rows)
    batch = jax.jit(source.assemble, out_shardings=rows)(resident, crossed)
    for name, values in source.batch(3).items():
        np.testing.assert_array_equal(batch[name], values)


def test_training_crops_are_keyed_by_seed_and_position(tfds_dir):
    photos = data.load("photos", data_dir=tfds_dir, image_size=16)
    source = data.source(photos, 4, seed=1)
    again = data.source(photos, 4, seed=1)
    np.testing.assert_array_equal(source.batch(1)["image"], again.batch(1)["image"])
    half = again.local(1, np.array([2, 3]))["image"]
    np.testing.assert_array_equal(source.local(1)["image"][2:], half)
    # The same photo in the next epoch is cropped anew; in order, it is the central crop.
    everything = data.source(photos, 12, seed=1)
    first, second = everything.local(0), everything.local(1)
    by_row = [dict(zip(batch["index"].tolist(), batch["image"], strict=True)) for batch in (first, second)]
    assert any((by_row[0][row] != by_row[1][row]).any() for row in range(12))
    central = everything.in_order().local(0)["image"]
    np.testing.assert_array_equal(central, photos.read(np.arange(12))["image"])


class BrokenRows(ArrayRows):
    """A disk that fails."""

    def read(self, rows, seed=None, positions=None):
        raise OSError("disk unplugged")


def test_an_error_of_the_disk_reaches_the_loop(digits):
    rows = BrokenRows(**digits.arrays)
    dataset = data.Dataset("broken", 3, rows, digits.indices, shape=digits.shape)
    with pytest.raises(OSError, match="disk unplugged"):
        next(data.StreamSource(dataset, 4, 0).iterate(0, 3))


def test_iterate_of_a_memory_source(digits):
    source = data.MemorySource(digits, 8, 0)
    for t, local in zip(range(2, 5), source.iterate(2, 5, np.arange(4, 8)), strict=True):
        np.testing.assert_array_equal(local["index"], source.local(t)["index"][4:])


def test_rows_are_not_writable(digits):
    with pytest.raises(ValueError, match="read-only"):
        data.MemorySource(digits, 8, 0).local(0)["index"][0] = 1


def test_errors(digits, tfds_dir):
    disk = data.load("cifar100", data_dir=tfds_dir, in_memory=False)
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        data.source(digits, 0)
    with pytest.raises(UserError, match="has no examples"):
        data.source(digits.subset(np.array([], int)), 4)
    with pytest.raises(UserError, match=r"seed must be in"):
        data.source(digits, 4, -1)
    with pytest.raises(UserError, match="Unknown resident 'gpu'"):
        data.source(digits, 4, resident="gpu")
    with pytest.raises(UserError, match="'cifar100' is on disk: load it with in_memory=True"):
        data.source(disk, 4, resident="device")
    with pytest.raises(UserError, match="workers and prefetch must be at least 1, got 0 and 4"):
        data.source(disk, 4, workers=0)
