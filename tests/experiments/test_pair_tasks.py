import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import pairs
from jkd.errors import UserError


def config(name="digit_halves", batch_size=16, **changes):
    made = ConfigDict({"batch_size": batch_size, "loop": {"workers": 1, "prefetch": 1}})
    made.data = pairs.section(name, **changes)
    return made


@pytest.fixture(scope="module")
def factors():
    return pairs.load_pairs(config("factors", examples=300, query_examples=60, validation_examples=40))


def test_parts_do_not_meet(factors):
    rows = factors.split(jax.random.key(1))
    assert {name: len(of) for name, of in rows.items()} == factors.sizes
    assert factors.sizes == {"query": 60, "validation": 40, "database": 200, "train": 200}
    assert sorted(np.concatenate([rows[name] for name in ("query", "validation", "database")])) == list(range(300))
    assert set(rows["train"]) <= set(rows["database"])
    assert (factors.split(jax.random.key(1))["query"] == rows["query"]).all()
    assert (factors.split(jax.random.key(2))["query"] != rows["query"]).any()


def test_networks_see_centered_sides(factors):
    consts = factors.draw(jax.random.key(0))
    batch = factors.view(consts, factors.pool.read(consts["rows"]["train"]))
    for side in pairs.SIDES:
        np.testing.assert_allclose(batch[side].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose((batch[side] ** 2).mean(), 1, rtol=1e-5)
    assert factors.shapes["first"] == (32,)
    both = factors.part(consts, "query+database", 100)
    assert both.dataset.indices.tolist() == [*consts["rows"]["query"], *consts["rows"]["database"]]
    assert set(factors.source(consts, 8).batch(0)) >= {"first", "second", "label", "first_private", "index"}


def file_of(tmp_path, split, several=True):
    rng, rows = np.random.RandomState(0), len(split)
    label = rng.rand(rows, 3) < 0.5 if several else rng.randint(3, size=rows)
    mask = np.arange(4) < rng.randint(1, 5, size=(rows, 1))
    second = rng.rand(rows, 4, 2) * mask[..., None]
    np.savez(tmp_path / "own.npz", first=rng.rand(rows, 5), second=second, second_mask=mask, label=label, split=split)
    return str(tmp_path / "own.npz")


def test_users_parts_are_kept(tmp_path):
    split = np.array(["train"] * 20 + ["query"] * 5 + ["database"] * 15)
    task = pairs.load_pairs(config("nuswide", data_dir=file_of(tmp_path, split), validation_examples=6, batch_size=8))
    rows = task.split(jax.random.key(0))
    assert rows["query"].tolist() == list(range(20, 25))
    assert len(rows["validation"]) == 6
    assert len(rows["database"]) == 29
    assert set(rows["train"]) == set(rows["database"]) & set(range(20))
    assert not set(rows["validation"]) & (set(rows["query"]) | set(rows["database"]))
    consts = task.draw(jax.random.key(0))
    batch = task.view(consts, task.pool.read(rows["query"]))
    assert (batch["second"][~batch["second_mask"]] == 0).all()
    assert (consts["statistics"]["second"]["mean"] == 0).all()


def test_few_are_enough_to_train_on():
    task = pairs.load_pairs(config(train_examples=50))
    assert task.sizes == {"query": 397, "validation": 200, "database": 1200, "train": 50}


def test_stand_ins():
    c = config("nuswide", blank=True, num_examples=5000, num_classes=21, several=True, masked=True)
    c.data.first_shape, c.data.second_shape = (4096,), (9, 64)
    task = pairs.load_pairs(c)
    assert task.shapes == {"first": (4096,), "second": (9, 64), "second_mask": (9,), "label": (21,)}
    assert task.sizes["train"] == 5000 - 597


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "flickr"}, "Unknown data.name 'flickr'"),
        ({"name": "nuswide"}, "set data.data_dir to a .npz"),
        ({"query_examples": 1700}, "must leave some of the 1797 pairs"),
        ({"query_examples": 0}, r"data.query_examples=0 \(at least 1\)"),
        ({"train_examples": 10}, "There are 10 training pairs, less than a batch: batch_size is 16"),
        ({"name": "tfds"}, "need a set and its features"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        pairs.load_pairs(config(**changes))
