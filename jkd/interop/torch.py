"""Weights of PyTorch models in ours, and ours under PyTorch's names; torch itself is not needed.

    state_dict = read_state_dict("resnet56.pth")  # or .safetensors
    variables = from_torch(nn.resnet56(100), state_dict)
    save_torch("back.safetensors", nn.resnet56(100), variables)

Layers are named by the tables of `jkd/interop/torch_names.py`. The arithmetic needs no conversion: our models pad, pool
and normalize as their PyTorch peers do. Images must be scaled and normalized as the weights expect.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax.typing import ArrayLike

from jkd.errors import UserError
from jkd.interop.safetensors import load_safetensors, save_safetensors
from jkd.interop.torch_names import UNUSED, Rules, module_name, rules, styles
from jkd.interop.torch_pickle import read_pickle
from jkd.nn.apply import init

PICKLES = (".pth", ".pt")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
SHOWN = 5  # of the names in an error
ENTRIES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
COUNTER = "num_batches_tracked"  # of every norm; only a PyTorch norm without momentum reads it


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, or of a .pth or .pt file, by their PyTorch names.

    A pickle is read without running anything that it names; see `jkd/interop/torch_pickle.py`. Wrappers such as
    {"model": ...} are taken off.

    Raises:
      UserError: if the file cannot be read, is damaged, names anything but tensors, or holds no state dict.
    """
    if not str(path).endswith(PICKLES):
        tree, _ = load_safetensors(path)
        nested = [name for name, leaf in tree.items() if isinstance(leaf, dict)]
        if nested or not tree:
            raise UserError(f"{path} holds no state dict of PyTorch, but {nested or 'nothing'}.")
        return tree
    try:
        data = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return read_pickle(data, path)


def from_torch(
    model: nn.Module,
    state_dict: Mapping[str, ArrayLike],
    *,
    image_shape: Sequence[int] = (32, 32, 3),
    style: str | None = None,
) -> dict[str, Any]:
    """A model's variables from a PyTorch state dict, in the model's dtypes, on the host.

    Args:
      model: a model of `jkd.nn`.
      state_dict: arrays by PyTorch's names; "module." before all of them is taken off, and auxiliary heads, which only
        training uses, are left out.
      image_shape: of one image: its channels count, and for an "mlp" its size.
      style: of the names, see `jkd/interop/torch_names.py`; None takes the one that fits best.

    Raises:
      UserError: if entries are missing, unknown to the model or of another shape: they are named.
    """
    given = _stripped(model, state_dict)
    leaves = list(_leaves(jax.eval_shape(lambda: init(model, jax.random.key(0), tuple(image_shape)))))
    tables = styles(model) if style is None else {style: rules(model, style)}
    misfits = {name: _misfits(leaves, given, table) for name, table in tables.items()}
    style = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[style]:
        raise UserError(
            f"The state dict does not fit this {type(model).__name__} by its {style} names: {_listed(misfits[style])}."
            f"{_classes(model, given)}"
        )
    variables: dict[str, Any] = {}
    for path, leaf in leaves:
        array = _turned(np.asarray(given[_name(path, tables[style])]), path, back=False)
        _put(variables, path, np.ascontiguousarray(array).astype(leaf.dtype).reshape(leaf.shape))
    return variables


def to_torch(model: nn.Module, variables: Mapping[str, Any], *, style: str | None = None) -> dict[str, np.ndarray]:
    """The variables of one model as numpy arrays by PyTorch's names: what `load_state_dict(strict=True)` takes.

    Raises:
      UserError: for a style that the model does not have, or variables that are not the model's.
    """
    table, found = rules(model, style), {}
    for path, leaf in _leaves(jax.device_get(variables)):
        name = _name(path, table)
        if name in found:
            raise UserError(f"{'/'.join(path)} and another leaf are both called {name}.")
        found[name] = np.ascontiguousarray(_turned(np.asarray(leaf), path, back=True))
        if name.endswith(".running_var"):
            found[f"{name.removesuffix('running_var')}{COUNTER}"] = np.zeros((), np.int64)
    return found


def save_torch(
    path: str | os.PathLike,
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    style: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `to_torch` as one new .safetensors file.

    Raises:
      UserError: as `to_torch`, or if the file exists.
    """
    save_safetensors(path, to_torch(model, variables, style=style), {"format": "pt", **(metadata or {})})


def num_classes(model: nn.Module, state_dict: Mapping[str, ArrayLike]) -> int | None:
    """The outputs of the classifier in a state dict of a model like `model`; None where it is not found."""
    given = _stripped(model, state_dict)
    names = [_name(("params", "head", "kernel"), table) for table in styles(model).values()]
    return next((len(np.asarray(given[name])) for name in names if name in given), None)


def _stripped(model: nn.Module, state_dict: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    given = dict(state_dict)
    for prefix in PREFIXES * 2:  # in either order
        if given and all(name.startswith(prefix) for name in given):
            given = {name.removeprefix(prefix): leaf for name, leaf in given.items()}
    unused = re.compile(UNUSED.get(type(model), ""))
    return {name: leaf for name, leaf in given.items() if not (name.endswith(COUNTER) or unused.fullmatch(name))}


def _leaves(variables: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree.leaves_with_path(variables):
        yield tuple(key.key for key in path), leaf


def _name(path: tuple[str, ...], table: Rules) -> str:
    collection, *layer, kind = path
    if (collection, kind) not in ENTRIES:
        raise UserError(f"{'/'.join(path)} has no counterpart in PyTorch.")
    return f"{module_name('/'.join(layer), table)}.{ENTRIES[collection, kind]}"


def _turned(array: np.ndarray, path: tuple[str, ...], *, back: bool) -> np.ndarray:
    """A kernel [*window, in, out] as PyTorch's [out, in, *window], or with not `back` the reverse."""
    if path[-1] != "kernel":
        return array
    window = array.ndim - 2
    return array.transpose(-1, -2, *range(window)) if back else array.transpose(*range(2, 2 + window), 1, 0)


def _misfits(leaves: Sequence[Any], given: Mapping[str, Any], table: Rules) -> list[str]:
    """What is wrong with a state dict for one table: one phrase a name."""
    names = {_name(path, table): (path, leaf.shape) for path, leaf in leaves}
    missing = [f"{name} is missing" for name in names if name not in given]
    extra = [f"{name} is unknown" for name in given if name not in names]
    shapes = []
    for name, (path, shape) in names.items():
        wanted = _turned(np.broadcast_to(0, shape), path, back=True).shape
        if name in given and np.shape(given[name]) != wanted:
            shapes.append(f"{name} is {list(np.shape(given[name]))}, not {list(wanted)}")
    return [*shapes, *missing, *extra]


def _listed(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _classes(model: Any, given: Mapping[str, Any]) -> str:
    found = num_classes(model, given)
    return (
        f" It has {found} classes and the model {model.num_classes}." if found not in (None, model.num_classes) else ""
    )


def _put(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
