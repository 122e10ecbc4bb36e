"""Trees as .safetensors files, bit for bit."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkd.errors import UserError
from jkd.interop.safetensors import DTYPES, load_safetensors, save_safetensors

pytest.importorskip("safetensors")


def bits(array):
    array = np.asarray(array)
    return (array.dtype, array.shape, array.tobytes())


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return jax.tree.all(jax.tree.map(lambda a, b: bits(a) == bits(b), first, second))


def test_every_type_comes_back(tmp_path):
    random = np.random.RandomState(0)
    tree = {}
    for name, dtype in DTYPES.items():
        raw = random.randint(0, 256, 6 * np.dtype(dtype).itemsize, np.uint8)
        tree[name] = (raw % 2).astype(bool) if name == "BOOL" else raw.view(dtype)
    tree = {"all": tree, "scalar": np.float32(3), "none": np.zeros((0, 4), np.int8), "empty": {}, "deep": {"er": {}}}
    tree["view"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))[:, ::2]
    save_safetensors(tmp_path / "a.safetensors", tree, {"stage": "kd"})
    found, metadata = load_safetensors(tmp_path / "a.safetensors")
    assert same(found, tree)
    assert metadata == {"stage": "kd"}


trees = st.recursive(
    st.lists(st.integers(-5, 5), max_size=3).map(lambda x: np.asarray(x, np.int16)),
    lambda inner: st.dictionaries(st.text("abc.", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), trees, max_size=3))
def test_any_nested_dicts_come_back(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("trees") / "x.safetensors"
    save_safetensors(file, tree)
    assert same(load_safetensors(file)[0], tree)


def test_arrays_that_are_split_over_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(jnp.arange(64, dtype=jnp.bfloat16), jax.NamedSharding(mesh, jax.P("x")))
    save_safetensors(tmp_path / "a.safetensors", {"x": split})
    assert same(load_safetensors(tmp_path / "a.safetensors")[0], {"x": np.arange(64).astype(jnp.bfloat16)})


def test_a_reader_without_jkd(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"params": {"head": {"bias": np.arange(3.0)}}}, {"stage": "kd"})
    code = (
        "import sys, json\nfrom safetensors import safe_open\n"
        f"f = safe_open({str(tmp_path / 'a.safetensors')!r}, 'np')\n"
        "print(json.dumps([list(f.keys()), f.metadata(), f.get_tensor('params/head/bias').tolist()]))\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [["params/head/bias"], {"stage": "kd"}, [0.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": [np.ones(2)]}, "a is a list; a file holds nested dicts of arrays only."),
        ({"a": {"b": None}}, "a/b is a NoneType; a file holds"),
        (np.ones(2), "The tree is a ndarray; a file holds"),
        ({"a/b": np.ones(2)}, "The tree: keys must be strings without '/', got 'a/b'."),
        ({"a": {3: np.ones(2)}}, "a: keys must be strings without '/', got 3."),
        ({"a": np.ones(2, np.complex128)}, "a is of type complex128, which a safetensors file cannot hold."),
        ({"a": jax.random.key(0)}, "a is of type key<fry>, which a safetensors file cannot hold."),
    ],
)
def test_trees_that_a_file_cannot_hold(tree, says, tmp_path):
    with pytest.raises(UserError) as error:
        save_safetensors(tmp_path / "a.safetensors", tree)
    assert str(error.value).startswith(says)
    assert not any(tmp_path.iterdir())


def test_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_safetensors(file)
    save_safetensors(file, {"x": np.arange(8)})
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        save_safetensors(file, {"x": np.ones(8)})
    data = file.read_bytes()
    for damaged in (b"", b"x" * 20, data[:-3], data[:8] + b"[]" + data[10:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or no safetensors file"):
            load_safetensors(file)
