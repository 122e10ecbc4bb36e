"""Files of PyTorch's weights, written here by hand in both layouts; and those that must not be read."""

import collections
import io
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkd.errors import UserError
from jkd.interop.torch import read_state_dict
from jkd.interop.torch_pickle import KNOWN, read_pickle

FLAT = np.arange(24, dtype=np.float32)


class Named:
    """Pickled as the global `module.name`."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Pickler(pickle._Pickler):  # the one that can be taught to write names of what is not here
    def persistent_id(self, value):
        return value.pid if isinstance(value, Stored) else None

    def save(self, value, *args, **options):
        if isinstance(value, Named):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *args, **options)


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = Named(*function), arguments


class Stored:
    """A storage as a pickle refers to it."""

    def __init__(self, kind="FloatStorage", key="0", size=24, more=()):
        self.pid = ("storage", Named("torch", kind), key, "cpu", size, *more)


def tensor(storage, offset, shape, strides, rebuild="_rebuild_tensor_v2"):
    return Call(("torch._utils", rebuild), storage, offset, shape, strides, False, collections.OrderedDict())


def pickled(tree):
    file = io.BytesIO()
    Pickler(file, 2).dump(tree)
    return file.getvalue()


def archive(tree, storages=None, kind=zipfile.ZIP_STORED, more=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as made:
        made.writestr("archive/data.pkl", tree if isinstance(tree, bytes) else pickled(tree))
        for key, data in ({"0": FLAT.tobytes()} if storages is None else storages).items():
            made.writestr(f"archive/data/{key}", data)
        for name, data in more:
            made.writestr(name, data)
    return file.getvalue()


def sequence(tree, flat=FLAT, system=None):
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, system or {"little_endian": True})]
    tail = pickle.dumps(["0"], 2) + struct.pack("<q", flat.size) + flat.tobytes()
    return b"".join(head) + pickled(tree) + tail


@pytest.mark.parametrize("write", [archive, lambda tree: sequence(tree, FLAT)], ids=["zip", "sequence"])
def test_tensors_are_views_of_storages(write):
    more = (None,) if write is not archive else ()
    tree = collections.OrderedDict(
        whole=tensor(Stored(more=more), 0, (2, 3, 4), (12, 4, 1)),
        turned=tensor(Stored(more=more), 1, (3, 2), (1, 12), "_rebuild_tensor"),
        scalar=tensor(Stored(more=more), 7, (), ()),
        empty=tensor(Stored(more=more), 0, (0, 4), (4, 1)),
        parameter=Call(("torch._utils", "_rebuild_parameter"), tensor(Stored(more=more), 2, (2,), (3,)), True, {}),
    )
    found = read_pickle(write({"epoch": 3, "model": tree, "best": tensor(Stored(more=more), 0, (1,), (1,))}), "x.pth")
    np.testing.assert_array_equal(found["whole"], FLAT.reshape(2, 3, 4))
    np.testing.assert_array_equal(found["turned"], [[1, 13], [2, 14], [3, 15]])
    np.testing.assert_array_equal(found["parameter"], [2, 5])
    assert found["scalar"] == 7
    assert found["scalar"].shape == ()
    assert found["empty"].shape == (0, 4)
    assert list(found) == list(tree)


def test_types_of_storages():
    half = np.arange(4).astype(jnp.bfloat16)
    found = read_pickle(archive({"a": tensor(Stored("BFloat16Storage"), 1, (3,), (1,))}, {"0": half.tobytes()}), "x")
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"], half[1:])
    longs = read_pickle(
        archive({"a": tensor(Stored("LongStorage"), 0, (2,), (1,))}, {"0": struct.pack("<2q", 5, -1)}), "x"
    )
    np.testing.assert_array_equal(longs["a"], [5, -1])


ONE = {"a": tensor(Stored(), 0, (24,), (1,))}


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (("posix", "system"), ("touch FILE",)),
        (("os", "system"), ("touch FILE",)),
        (("builtins", "eval"), ("open('FILE', 'w')",)),
        (("__builtin__", "eval"), ("open('FILE', 'w')",)),
        (("torch._utils", "_rebuild_sparse_tensor"), (1,)),
        (("torch", "load"), ("FILE",)),
        (("collections", "OrderedDict.fromkeys"), ("a",)),
        (("argparse", "Namespace"), ()),
    ],
)
@pytest.mark.parametrize("write", [archive, sequence], ids=["zip", "sequence"])
def test_what_a_pickle_must_not_name(function, arguments, write, tmp_path):
    file, wanted = tmp_path / "x.pth", tmp_path / "made"
    arguments = [str(a).replace("FILE", str(wanted)) for a in arguments]
    file.write_bytes(write({**ONE, "opt": Call(function, *arguments)}))
    with pytest.raises(UserError) as error:
        read_state_dict(file)
    assert f"{file} cannot be used: its pickle asks for {'.'.join(function)}, which is refused" in str(error.value)
    assert not os.path.exists(wanted)


@pytest.mark.parametrize("name", ["FloatStorage", "_utils _rebuild_tensor_v2", "Size"])
@pytest.mark.parametrize("state", [(3, ">", None, None, None, -1, -1, 0), {"a": 1}, (None, {"__defaults__": (1,)})])
def test_a_pickle_leaves_nothing_behind(name, state):
    module, _, name = f"torch.{name}".rpartition(" ") if " " in name else ("torch", "", name)
    build = pickle.PROTO + b"\x02" + pickle.GLOBAL + f"{module}\n{name}\n".encode()
    before = [(key, known, vars(known).copy() if hasattr(known, "__dict__") else None) for key, known in KNOWN.items()]
    with pytest.raises(UserError):
        read_pickle(archive(build + pickle.dumps(state, 2)[2:-1] + pickle.BUILD + pickle.STOP), "x.pth")
    assert before == [(key, known, vars(known) if hasattr(known, "__dict__") else None) for key, known in KNOWN.items()]
    assert KNOWN["torch._utils", "_rebuild_tensor_v2"].__defaults__ is None
    assert np.dtype(np.float32).isnative


def test_one_damaged_byte_does_not_fill_the_memory():
    huge = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f" + pickle.STOP
    with pytest.raises(UserError, match="damaged"):
        read_pickle(archive(huge), "x.pth")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (archive(tensor(Stored(), 0, (1,), (1,))), "it holds a Tensor, not tensors by name"),
        (archive({}), "it holds a dict, not tensors by name"),
        (archive({"a": 3}), "it holds no state dict: 'a' is a int"),
        (archive({"epoch": 1, "state_dict": {"model": {"a": [1]}}}), "it holds no state dict: 'a' is a list"),
        (archive(ONE, more=[("archive/byteorder", "big")]), "it was written on a big-endian machine"),
        (sequence(ONE, system={"little_endian": False}), "it was written on a big-endian machine"),
        (archive(ONE, kind=zipfile.ZIP_DEFLATED), "damaged or no file of PyTorch's weights"),
        (archive({"a": tensor(Stored(), 1, (24,), (1,))}), "damaged"),  # beyond its storage
        (archive({"a": tensor(Stored(), 0, (10**15,), (0,))}), "damaged"),  # few bytes, much memory
        (archive({"a": tensor(Stored(), 0, (2,), (-1,))}), "damaged"),
        (archive({"a": tensor(Stored(), -1, (2,), (1,))}), "damaged"),
        (archive({"a": tensor("no storage", 0, (2,), (1,))}), "damaged"),
        (archive(ONE, {}), "damaged"),
        (archive(pickled(ONE)[:-9]), "damaged"),
        (pickle.dumps({"a": 1}), "damaged"),
        (b"", "damaged"),
        (b"PK\x03\x04", "damaged"),
    ],
)
def test_files_that_hold_no_weights(data, says):
    with pytest.raises(UserError, match=says) as error:
        read_pickle(data, "x.pth")
    assert str(error.value).startswith("x.pth ")


@pytest.mark.parametrize("write", [archive, sequence])
def test_truncated_files(write):
    data = write(ONE)
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(UserError, match="x.pth"):
            read_pickle(data[:length], "x.pth")


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_error_or_a_state_dict(at, noise):
    data = bytearray(sequence(ONE))
    at %= len(data)
    data[at : at + len(noise)] = noise
    try:
        found = read_pickle(bytes(data), "x.pth")
    except UserError:
        return
    assert all(isinstance(leaf, np.ndarray) for leaf in found.values())


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"x.pth cannot be read: No such file"):
        read_state_dict(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.safetensors cannot be read: No such file"):
        read_state_dict(tmp_path / "x.safetensors")
