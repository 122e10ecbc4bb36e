"""The tensors of PyTorch's .pth and .pt files, without torch and without running what a pickle asks for.

A pickle can call any function. Here it can name ordered dicts, tensors and the types of their storages; whatever else
it names is refused before it is looked up. Both layouts are read: the zip archive (since PyTorch 1.6), and the
sequence of pickles before.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jkd.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the old layout
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # what a checkpoint calls its state dict
DEEPEST = 3  # wrappers in wrappers


class Storage(NamedTuple):
    """A flat array that a pickle refers to, of one of the STORAGES."""

    key: str
    kind: str

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return np.dtype(STORAGES[self.kind])


class Tensor(NamedTuple):
    """A strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("not a tensor")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch", "Size"): tuple,
    **{("torch", name): name for name in STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise UserError(
                f"its pickle asks for {module}.{name}, which is refused: files of weights hold tensors only. "
                "In PyTorch, save model.state_dict() and nothing else"
            )
        known = KNOWN[module, name]
        # A pickle can also set attributes: not those of what outlives it. Strings and built-in types have none to set.
        return known if isinstance(known, str | type) else lambda *arguments: known(*arguments)

    def persistent_load(self, pid: Any) -> Storage:
        what, kind, key, _, _, *view = pid
        if what != "storage" or kind not in STORAGES or any(part is not None for part in view):
            raise ValueError("not a storage")
        return self.storages.setdefault(key, Storage(key, kind))


def _load(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What the pickle at the file's position makes, and the storages by their keys; the position is behind it then."""
    start = file.tell()
    for code, number, position in pickletools.genops(file):
        # The unpickler makes room for as many objects at once: one damaged byte could fill the memory.
        if "PUT" in code.name and int(number or 0) > (position or 0):
            raise ValueError("more objects than bytes")
    file.seek(start)
    reader = _Unpickler(file)
    return reader.load(), reader.storages


def read_pickle(data: bytes, path: Any) -> dict[str, np.ndarray]:
    """The state dict in the bytes of a .pth file, by its names; wrappers like {"model": ...} are taken off.

    Raises:
      UserError: if the file is damaged, asks for anything but tensors, or holds no state dict; names `path`.
    """
    try:
        return _from_zip(data) if zipfile.is_zipfile(io.BytesIO(data)) else _from_pickles(data)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}.") from error
    except Exception as error:  # of what kind is up to the bytes
        raise UserError(f"{path} is damaged or no file of PyTorch's weights ({type(error).__name__}).") from error


def _from_zip(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("compressed")  # PyTorch never does, and few bytes could fill the memory
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UserError("it was written on a big-endian machine")
        tree, _ = _load(io.BytesIO(archive.read(pickled)))
        return _arrays(tree, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _from_pickles(data: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(data)
    magic, _, system = (_load(file)[0] for _ in range(3))
    if magic != MAGIC:
        raise ValueError("another format")
    if not system["little_endian"]:
        raise UserError("it was written on a big-endian machine")
    tree, storages = _load(file)
    found = {}
    for key in _load(file)[0]:
        count = int.from_bytes(file.read(8), "little")
        found[key] = file.read(count * storages[key].dtype.itemsize)
    return _arrays(tree, lambda storage: found[storage.key])


def _arrays(tree: Any, read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    found = _state_dict(tree)
    storages = {tensor.storage.key: tensor.storage for tensor in found.values()}
    flat = {key: np.frombuffer(read(storage), storage.dtype) for key, storage in storages.items()}
    return {name: _view(tensor, flat[tensor.storage.key]) for name, tensor in found.items()}


def _state_dict(tree: Any) -> dict[str, Tensor]:
    for _ in range(DEEPEST):
        inner = [tree[name] for name in WRAPPERS if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping)]
        tree = inner[0] if inner else tree
    if not isinstance(tree, Mapping) or not tree:
        raise UserError(f"it holds a {type(tree).__name__}, not tensors by name")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"it holds no state dict: {name!r} is a {type(value).__name__}")
    return dict(tree)


def _view(tensor: Tensor, flat: np.ndarray) -> np.ndarray:
    size = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    # An expanded tensor of few bytes could fill the memory: no more elements than are stored.
    if size > flat.size or (size and last >= flat.size):
        raise ValueError("beyond its storage")
    steps = [step * flat.itemsize for step in tensor.strides]
    return np.array(np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps), order="C")
