"""What is stored comes back bit for bit, and what differs is found."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from jkd import train
from jkd.errors import UserError
from jkd.train import fingerprints
from jkd.train.checkpoint import Checkpoints, load_plain, save_plain
from jkd.train.fingerprints import inspect_tree
from jkd.train.mesh import DEFAULT_RULES

ONE, EIGHT = train.make_mesh(devices=jax.devices()[:1]), train.make_mesh(fsdp=8)
SPLIT = ((".*", train.fsdp(min_size=1)),)
DTYPES = ("bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32", "complex64")


def tree_of_everything():
    arrays = {name: jnp.asarray(np.arange(16) % 3, name) for name in DTYPES}
    arrays["complex64"] = arrays["complex64"] * (1 + 2j)
    return {
        "arrays": arrays,
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 8),
        "other keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "nested": [None, (jnp.float32(2.5), {}), []],
        "numbers": (3, 2.5, True),
    }


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        y = jnp.asarray(y)
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(("mesh", "rules"), [(ONE, DEFAULT_RULES), (EIGHT, SPLIT)], ids=["one", "eight"])
def test_plain_trees_come_back(mesh, rules, tmp_path):
    folder = epath.Path(tmp_path) / "outcome"
    save_plain(folder, tree_of_everything(), {"t": 3}, mesh=mesh, rules=rules)
    for other, its_rules in ((ONE, DEFAULT_RULES), (EIGHT, SPLIT)):
        found, info = load_plain(folder, mesh=other, rules=its_rules)
        assert_same(found, tree_of_everything())
        assert info["t"] == 3
    assert found["arrays"]["float32"].sharding.spec == jax.sharding.PartitionSpec("fsdp")


@pytest.mark.parametrize(("mesh", "rules"), [(ONE, DEFAULT_RULES), (EIGHT, SPLIT)], ids=["one", "eight"])
def test_states_of_any_dtype_come_back(mesh, rules, tmp_path):
    state = train.place(jax.tree.map(jnp.asarray, tree_of_everything()), mesh, rules)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(epath.Path(tmp_path) / "run")
    assert checkpoints.restore_newest(target, print) is None
    checkpoints.save(7, state, {"t": 7})
    checkpoints.wait()
    found, meta = checkpoints.restore_newest(target, print)
    checkpoints.close()
    assert meta["t"] == 7
    assert_same(found, state)


def test_rules_go_by_the_names_in_the_tree(tmp_path):
    tree = {"a": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)}, "kernels": [jnp.ones((8, 8))]}
    rules = (("kernel$", train.shard(-1, "fsdp")), ("kernels/0", train.shard(0, "fsdp")))
    folder = epath.Path(tmp_path) / "outcome"
    save_plain(folder, tree, {}, mesh=EIGHT, rules=rules)
    found, _ = load_plain(folder, mesh=EIGHT, rules=rules)
    specs = jax.tree.map(lambda x: x.sharding.spec, found)
    P = jax.sharding.PartitionSpec
    assert specs == {"a": {"kernel": P(None, "fsdp"), "bias": P()}, "kernels": [P("fsdp")]}


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "I/O"), RuntimeError("RESOURCE_EXHAUSTED: ...")])
def test_what_passes_is_not_corruption(error, tmp_path, monkeypatch):
    state = {"x": train.place(jnp.arange(4.0), ONE)}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints" / "run")
    checkpoints.save(3, state, {})
    checkpoints.wait()

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_restore", fail)
        with pytest.raises(UserError, match=r"run/3 cannot be read now: .*Nothing was changed"):
            checkpoints.restore_newest(target, print)
    assert_same(checkpoints.restore_newest(target, print)[0], state)
    checkpoints.close()


def test_a_tree_without_arrays_comes_back(tmp_path):
    folder = epath.Path(tmp_path) / "consts"
    save_plain(folder, {"none": None, "list": []}, {}, mesh=ONE, rules=DEFAULT_RULES)
    assert load_plain(folder, mesh=ONE, rules=DEFAULT_RULES)[0] == {"none": None, "list": []}


def test_what_is_stored_is_never_overwritten(tmp_path):
    folder = epath.Path(tmp_path) / "outcome"
    save_plain(folder, {"x": jnp.zeros(2)}, {}, mesh=ONE, rules=DEFAULT_RULES)
    with pytest.raises(UserError, match="exists already"):
        save_plain(folder, {"x": jnp.ones(2)}, {}, mesh=ONE, rules=DEFAULT_RULES)
    assert (load_plain(folder, mesh=ONE, rules=DEFAULT_RULES)[0]["x"] == 0).all()


@pytest.mark.parametrize("tree", [{1: jnp.zeros(2)}, {"x": object()}, {"x": "text"}, train.Aux({}, {})])
def test_only_plain_trees_are_stored(tree, tmp_path):
    with pytest.raises(UserError, match="must be"):
        save_plain(epath.Path(tmp_path) / "outcome", tree, {}, mesh=ONE, rules=DEFAULT_RULES)
    assert not list(tmp_path.iterdir())


def test_fingerprints_do_not_depend_on_the_sharding_nor_on_who_counts(monkeypatch):
    """Small leaves are counted by numpy, others by a program: they find the same, NaN included."""
    tree = tree_of_everything()["arrays"]
    tree |= {f"nan_{name}": tree[name].at[3].set(np.nan) for name in ("bfloat16", "float32", "complex64")}
    placed = [train.place({**tree, "scalar": jnp.float32(2.5)}, mesh, SPLIT) for mesh in (ONE, EIGHT)]
    by_numpy = [inspect_tree(one) for one in placed]
    monkeypatch.setattr(fingerprints, "_SMALL", -1)
    monkeypatch.setattr(fingerprints, "_inspect_at_hand", None)
    by_program = [inspect_tree(one) for one in placed]
    assert by_numpy[0] == by_numpy[1] == by_program[0] == by_program[1]
    assert {name for name, found in by_numpy[0].items() if found["nan"]} == {n for n in tree if n.startswith("nan_")}
    with jax.enable_x64(True):
        wide = {"x": jnp.asarray([0.1, -3.0, 1e300]), "z": jnp.asarray([1 + 2j, -0.1j]), "i": jnp.arange(5)}
        found = inspect_tree(wide)
        monkeypatch.undo()
        assert inspect_tree(wide) == found


WORDS = np.arange(16, dtype=np.uint32)


@given(st.integers(0, 15), st.integers(0, 31))
def test_every_flipped_bit_shows(word, bit):
    altered = WORDS.copy()
    altered[word] ^= np.uint32(1) << np.uint32(bit)
    prints = [inspect_tree({"x": jnp.asarray(x).view(jnp.float32)})["x"]["fingerprint"] for x in (WORDS, altered)]
    assert prints[0] != prints[1]


def test_swapped_rows_show():
    values = jnp.arange(16.0)
    prints = [inspect_tree({"x": x})["x"]["fingerprint"] for x in (values, values[::-1])]
    assert prints[0] != prints[1]
