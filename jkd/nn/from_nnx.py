"""A door through which a Flax NNX module looks like a linen one."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx, traverse_util

from jkd.errors import UserError

Path = tuple[Any, ...]
# In order: a variable belongs to the first kind that it is an instance of.
KINDS: dict[str, Any] = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "rngs": nnx.RngState,
    "other": ...,
}


def from_nnx(module: nnx.Module) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Splits `module` into (variables, apply_fn), which behave like those of a linen module.

    variables is a dict of nested dicts with string keys: "params", and where the module has any,
    "batch_stats" and "other" (every further kind of variable). `apply_fn(variables, x, train=False,
    mutable=False, rngs=None)` calls a fresh copy of the module, in the mode that `Module.train()` or
    `Module.eval()` sets, and returns its output, or (output, {collection: new values}) where `mutable` is
    True, a collection's name or several; the given module never changes. Pure: jit, grad and vmap apply.
    `rngs` is {stream: key}: streams with that name restart from the key, and a "default" stream without a
    key of its own from the first key. Gradients flow through all collections.

    Raises:
      UserError: from apply_fn, where a collection is missing, where the module changes one that is not
        mutable, or where it draws from a stream that was given no key (the same numbers would be drawn
        at every call).
    """
    graphdef, _ = nnx.split(module)
    values = _values(module)
    streams = values.pop("rngs")

    def apply_fn(
        variables: Mapping[str, Any],
        x: Any,
        train: bool = False,
        mutable: bool | str | Collection[str] = False,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> Any:
        flat = dict(streams)
        for name, template in values.items():
            flat.update(_flat(template, variables, name))
        copy = nnx.merge(graphdef, nnx.from_flat_state(flat))
        (copy.train if train else copy.eval)()
        seeds = _seeds(rngs)
        nnx.reseed(copy, **seeds)
        before, undrawn = _values(copy), _undrawn(copy, seeds)
        out = copy(x)
        after = _values(copy)
        _check_streams(undrawn)
        _check_changes(before, after, [name for name in values if not _is_mutable(name, mutable)])
        if mutable is False:
            return out
        kept = [name for name in values if values[name] and _is_mutable(name, mutable)]
        return out, {name: _nested({path: after[name][path] for path in values[name]}) for name in kept}

    return {name: _nested(flat) for name, flat in values.items() if flat or name == "params"}, apply_fn


def _values(module: nnx.Module) -> dict[str, dict[Path, Any]]:
    """The arrays of each kind of variable, by path."""
    states = nnx.state(module, *KINDS.values())
    return {
        kind: traverse_util.flatten_dict(nnx.to_pure_dict(state)) for kind, state in zip(KINDS, states, strict=True)
    }


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    # Modules in lists have integers in their paths, which no checkpoint keeps.
    return traverse_util.unflatten_dict({tuple(map(str, path)): value for path, value in flat.items()})


def _flat(template: Mapping[Path, Any], variables: Mapping[str, Any], name: str) -> dict[Path, Any]:
    """The values of collection `name`, under the paths of the module itself."""
    given = traverse_util.flatten_dict(variables.get(name, {}))
    missing = [path for path in template if tuple(map(str, path)) not in given]
    if missing:
        raise UserError(f"variables[{name!r}] lacks {'/'.join(map(str, missing[0]))}, which the module has.")
    return {path: given[tuple(map(str, path))] for path in template}


def _seeds(rngs: Mapping[str, jax.Array] | None) -> dict[str, Any]:
    """The keys of the streams; "default" serves modules that were built from one unnamed key."""
    if not rngs:
        return {}
    # Folded, so that a default and a named stream of one module never draw the same numbers.
    return {"default": jax.random.fold_in(next(iter(rngs.values())), 0xDEFA), **rngs}


def _is_mutable(name: str, mutable: bool | str | Collection[str]) -> bool:
    if isinstance(mutable, bool | str):
        return mutable is True or mutable == name
    return name in mutable


def _undrawn(module: nnx.Module, seeds: Collection[str]) -> list[tuple[nnx.RngStream, Any]]:
    """The random streams without a key of the caller's, each with its present count."""
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    return [(stream, stream.count.get_value()) for stream in streams if stream.tag not in seeds]


def _check_streams(undrawn: list[tuple[nnx.RngStream, Any]]) -> None:
    # Counts may be traced: a draw shows by another array, not by another value.
    drawn = sorted({stream.tag for stream, count in undrawn if stream.count.get_value() is not count})
    if drawn:
        raise UserError(f"The module draws random numbers: pass rngs={{{drawn[0]!r}: key}} to apply_fn.")


def _check_changes(before: Mapping[str, Any], after: Mapping[str, Any], frozen: Collection[str]) -> None:
    for name in frozen:
        for path, value in before[name].items():
            if after[name].get(path) is not value:
                raise UserError(f"The module changes {'/'.join(map(str, path))}: pass mutable=[{name!r}] to apply_fn.")
