"""Plain trees as .safetensors files: nested dicts of arrays under names like `params/block1/conv/kernel`.

A reader without jkd needs the `safetensors` package alone, in any framework: the names are the paths of the tree. The
file's metadata hold what the names cannot say, the paths of empty dicts ("empty", JSON), beside the caller's own.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jkd.errors import UserError

SEPARATOR = "/"
# What the file format calls the types that it shares with JAX.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def save_safetensors(path: str | os.PathLike, tree: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes nested dicts of arrays as one new file, bit for bit.

    Args:
      path: local or remote; the file must not exist.
      tree: dicts with string keys without "/", and arrays at their ends.
      metadata: text by name, stored in the file's header.

    Raises:
      UserError: if the file exists, or the tree holds anything else.
    """
    numpy_format = _package("safetensors.numpy")
    file = epath.Path(path)
    if file.exists():
        raise UserError(f"{path} exists already and is not overwritten.")
    leaves = dict(_flatten(tree, ""))
    empty = [name for name, leaf in leaves.items() if leaf is None]
    arrays = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    more = {"empty": json.dumps(empty)} if empty else {}
    data = numpy_format.save(arrays, {**(metadata or {}), **more} or None)
    temporary = file.parent / f".{file.name}.tmp"
    temporary.write_bytes(data)
    temporary.replace(file)


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a file as nested dicts of numpy arrays, and its metadata.

    Files of other programs load too; a name without "/" is a leaf of the outermost dict.

    Raises:
      UserError: if there is no such file, it is damaged, or it holds a type that JAX does not have.
    """
    package = _package("safetensors")
    data, metadata = _read(path)
    try:
        flat = package.deserialize(data)
    except package.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from error
    tree: dict[str, Any] = {}
    for name, view in flat:
        if view["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of type {view['dtype']}, which cannot be read; known: {list(DTYPES)}.")
        _insert(tree, name, np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"]), path)
    for name in json.loads(metadata.pop("empty", "[]")):
        _insert(tree, name, {}, path)
    return tree, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a file."""
    return _read(path)[1]


def _package(name: str) -> Any:
    try:
        return __import__(name, fromlist=["SafetensorError"])
    except ImportError as error:
        raise UserError("This needs the safetensors package: pip install 'jkd[export]'.") from error


def _read(path: str | os.PathLike) -> tuple[bytes, dict[str, str]]:
    # The header: its length in 8 bytes, then JSON.
    try:
        data = epath.Path(path).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return data, dict(header.get("__metadata__", {}))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file.") from error


def _flatten(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str) or SEPARATOR in key:
                raise UserError(f"{where or 'The tree'}: keys must be strings without '/', got {key!r}.")
        if not tree and where:
            yield where, None
        for key in sorted(tree):
            yield from _flatten(tree[key], f"{where}{SEPARATOR}{key}" if where else key)
        return
    if not where or not isinstance(tree, jax.Array | np.ndarray | np.generic):
        raise UserError(f"{where or 'The tree'} is a {type(tree).__name__}; a file holds nested dicts of arrays only.")
    array = np.asarray(jax.device_get(tree)) if tree.dtype in DTYPES.values() else None
    if array is None:
        raise UserError(f"{where} is of type {tree.dtype}, which a safetensors file cannot hold.")
    yield where, array if array.flags.c_contiguous else array.copy()


def _insert(tree: dict[str, Any], name: str, leaf: Any, path: Any) -> None:
    *parents, last = name.split(SEPARATOR)
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{path}: {name} is below an array.")
    tree[last] = leaf
