"""Checkpoints that are atomic, verified leaf by leaf, and restored onto any mesh."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jkd.errors import UserError
from jkd.train.damage import CorruptCheckpointError, check_meta, first_line, passing, sealed, usable
from jkd.train.fingerprints import inspect_tree
from jkd.train.mesh import place_leaf, sharding_of
from jkd.train.processes import barrier, worst
from jkd.train.workdir import move_folder
from jkd.trees import path_name


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(tree: Any) -> Any:
    # What orbax can write: no typed keys, and one number in place of an array without any.
    def raw(x: Any) -> Any:
        return jax.random.key_data(x) if is_key(x) else x if x.size else jnp.zeros(1, x.dtype)

    return jax.tree.map(raw, tree)


def _cooked(tree: Any, target: Any) -> Any:
    # The inverse of `_raw`, for a target of shapes.
    def cooked(x: Any, wanted: Any) -> Any:
        if is_key(wanted):
            return jax.random.wrap_key_data(x, impl=_impl(wanted))
        return x if wanted.size else x[:0].reshape(wanted.shape)

    return jax.tree.map(cooked, tree, target)


def _impl(keys: Any) -> str:
    # Traced, because the target is a ShapeDtypeStruct, which `key_impl` does not take.
    found: list[str] = []
    jax.eval_shape(lambda x: found.append(str(jax.random.key_impl(x))), keys)
    return found[0]


def _verify(tree: Any, written: dict[str, dict[str, Any]]) -> None:
    for name, now in inspect_tree(tree).items():
        if now["fingerprint"] != written[name]["fingerprint"]:
            raise CorruptCheckpointError(f"{name} was altered on disk (fingerprints differ)")


def check_no_nan(tree: Any, when: str) -> dict[str, dict[str, Any]]:
    """Inspects a state (see `inspect_tree`) and raises UserError if it holds a NaN: it must not be stored."""
    leaves = inspect_tree(_raw(tree))
    bad = [name for name, leaf in leaves.items() if leaf["nan"]]
    if bad:
        raise UserError(
            f"{when}: the state holds NaN in {', '.join(bad[:3])}{' ...' if bad[3:] else ''}; "
            "it was not saved. Lower the learning rate, or look at the last good checkpoint."
        )
    return leaves


# --- plain trees: dicts, lists, tuples and arrays, restorable without the code that made them ---


def _encode(tree: Any, leaves: list[Any], where: str) -> Any:
    if tree is None:
        return {"none": True}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_encode(x, leaves, f"{where}/{i}") for i, x in enumerate(tree)]}
    if isinstance(tree, dict):
        if not all(isinstance(name, str) for name in tree):
            raise UserError(f"{where}: the keys of a stored dict must be strings, got {list(tree)}.")
        return {"dict": {name: _encode(tree[name], leaves, f"{where}/{name}") for name in sorted(tree)}}
    if isinstance(tree, jax.Array | np.ndarray | np.generic | int | float | bool):
        leaves.append(jnp.asarray(tree) if not isinstance(tree, jax.Array) else tree)
        shape = leaves[-1].shape
        return {"array": len(leaves) - 1} if math.prod(shape) else {"empty": [len(leaves) - 1, list(shape)]}
    raise UserError(
        f"{where} is a {type(tree).__name__}; what a stage prepares or publishes must be a plain tree of dicts, "
        "lists, tuples and arrays (a NamedTuple: x._asdict(); a TrainState: x.variables)."
    )


def check_plain(tree: Any, where: str) -> None:
    """Raises UserError unless `tree` (of shapes or arrays) is one that `save_plain` can write."""
    _encode(jax.tree.map(lambda x: 0, tree), [], where)


def _decode(code: Any, leaves: list[Any]) -> Any:
    ((kind, value),) = code.items()
    if kind == "array":
        return leaves[value]
    if kind == "empty":
        return leaves[value[0]][:0].reshape(value[1])
    if kind == "dict":
        return {name: _decode(x, leaves) for name, x in value.items()}
    if kind == "none":
        return None
    return {"list": list, "tuple": tuple}[kind](_decode(x, leaves) for x in value)


def save_plain(directory: epath.Path, tree: Any, meta: dict[str, Any], *, mesh: Any, rules: Any) -> None:
    """Writes a plain tree and JSON-able `meta` as one atomic directory; what an earlier try left is removed.

    Raises:
      UserError: if the tree holds anything but dicts with string keys, lists, tuples and arrays.
    """
    if is_stored(directory):
        raise UserError(f"{directory} exists already; a stored result is never overwritten.")
    leaves: list[Any] = []
    structure = _encode(tree, leaves, directory.name)
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    keys = [str(jax.random.key_impl(x)) if is_key(x) else None for x in leaves]
    raw = _raw(leaves)
    shardings = _layout(names, keys, [x.shape for x in raw], mesh, rules)
    arrays = {f"{i}": place_leaf(x, s) for i, (x, s) in enumerate(zip(raw, shardings, strict=True))}
    info = {"structure": structure, "names": names, "leaves": inspect_tree(arrays), "keys": keys, **meta}
    items: dict[str, Any] = {"meta": ocp.args.JsonSave(sealed(info))}
    if arrays:
        items["arrays"] = ocp.args.PyTreeSave(arrays)
    _remove_unfinished(directory)
    handlers = {"arrays": _arrays_handler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.Composite(**items))


def _layout(names: list[str], keys: list[str | None], shapes: list[tuple[int, ...]], mesh: Any, rules: Any) -> list:
    # By the names that the leaves have in their tree; the data of keys are small and stay whole.
    return [
        sharding_of(name, shape, mesh, () if key else rules)
        for name, key, shape in zip(names, keys, shapes, strict=True)
    ]


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    # Orbax divides an array among the devices with a copy, by one compiled slice for every shape: pays from a MiB on.
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _remove_unfinished(directory: epath.Path) -> None:
    barrier(f"before-{directory.name}")
    if jax.process_index() == 0 and directory.parent.exists():
        for path in directory.parent.glob(f"{directory.name}*"):
            if not is_stored(path):
                path.rmtree()
    barrier(f"cleared-{directory.name}")


def is_stored(directory: epath.Path) -> bool:
    """Whether `save_plain` has finished writing this directory."""
    return directory.exists() and ocp.utils.is_checkpoint_finalized(directory)


def load_meta(directory: epath.Path) -> dict[str, Any]:
    """Reads the `meta` of a directory that `save_plain` wrote.

    Raises:
      UserError: if it cannot be read, or is not what was written.
    """
    with usable(directory):
        return check_meta(json.loads((directory / "meta" / "metadata").read_text()))


def load_plain(directory: epath.Path, *, mesh: Any, rules: Any) -> tuple[Any, dict[str, Any]]:
    """Reads back what `save_plain` wrote, sharded by the rules, every leaf verified.

    Raises:
      UserError: if the directory cannot be read, or an array differs from what was written.
    """
    info = load_meta(directory)
    with usable(directory):
        stored = [info["leaves"][f"{i}"] for i in range(len(info["names"]))]
        shardings = _layout(info["names"], info["keys"], [tuple(leaf["shape"]) for leaf in stored], mesh, rules)
        targets = {
            f"{i}": jax.ShapeDtypeStruct(leaf["shape"], jnp.dtype(leaf["dtype"]), sharding=sharding)
            for i, (leaf, sharding) in enumerate(zip(stored, shardings, strict=True))
        }
        _check_precision(directory, targets)
        arrays = _restore(directory, targets) if targets else {}
        _verify(arrays, info["leaves"])
    return build_plain(arrays, info), info


def build_plain(arrays: dict[str, Any], info: dict[str, Any]) -> Any:
    """The tree of these arrays, by number, that a directory's meta describes; traceable."""
    leaves = [
        arrays[f"{i}"] if key is None else jax.random.wrap_key_data(arrays[f"{i}"], impl=key)
        for i, key in enumerate(info["keys"])
    ]
    return _decode(info["structure"], leaves)


def _check_precision(directory: epath.Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    wide = sorted({str(x.dtype) for x in shapes.values() if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype})
    if wide:
        raise UserError(f"{directory} holds {', '.join(wide)} arrays: set JAX_ENABLE_X64=1, as it was written.")


def _restore(directory: epath.Path, target: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))).arrays


# --- the checkpoints of one running stage ---


class Checkpoints:
    """The checkpoints of one running stage: async, atomic, retained, verified when restored."""

    def __init__(self, directory: epath.Path, *, keep: int = 3):
        self._directory, self._keep = directory, keep
        self._manager = self._open()
        self._under_way = max(self._manager.all_steps(), default=0)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        handlers = {"state": _arrays_handler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> int:
        """Starts writing `tree` and JSON-able `meta` as checkpoint `step`; returns the one before, now complete.

        Raises:
          UserError: if the step is there already, or the tree holds a NaN.
        """
        if step in self._manager.all_steps():
            raise UserError(f"Checkpoint {self._directory / str(step)} exists already; it is never overwritten.")
        leaves = check_no_nan(tree, f"Step {step}")
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_raw(tree)), meta=ocp.args.JsonSave(sealed({"leaves": leaves, **meta}))
            ),
            force=True,
        )
        complete, self._under_way = self._under_way, step
        return complete

    def restore_newest(self, target: Any, say: Callable[[str], None]) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that reads back bit for bit, or None where there is none.

        A corrupt one is reported through `say` and moved to `corrupt/` beside the checkpoints.

        Args:
          target: the tree of `jax.ShapeDtypeStruct`s with shardings to restore into.
          say: prints one line.

        Raises:
          UserError: if a checkpoint is sound but its arrays are not the target's (the code has changed), or if
            there were checkpoints and all are corrupt.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            restored, problem = self._try(step, target)
            code = worst(0 if problem is None else 1 if not passing(problem) else 2)
            if code == 0:
                return restored
            reason = "another process could not read it" if problem is None else first_line(problem)
            if code == 2:
                raise UserError(f"{self._directory / str(step)} cannot be read now: {reason}. Nothing was changed.")
            say(f"Checkpoint {self._directory / str(step)} is corrupt ({reason}).")
            self._set_aside(step)
        if steps:
            raise UserError(
                f"All checkpoints in {self._directory} were corrupt and are now in {self._corrupt}. "
                "Run the same command once more to train this stage from its start."
            )
        return None

    def _try(self, step: int, target: Any) -> tuple[Any, Exception | None]:
        try:
            return self._restore(step, target), None
        except UserError:
            raise
        except Exception as error:
            return None, error

    def _restore(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        meta = check_meta(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
        raw = jax.tree.map(_raw_target, target)
        _check_leaves(raw, meta["leaves"], self._directory / str(step))
        how = ocp.args.PyTreeRestore(raw, restore_args=ocp.checkpoint_utils.construct_restore_args(raw))
        tree = self._manager.restore(step, args=ocp.args.Composite(state=how)).state
        _verify(tree, meta["leaves"])
        return _cooked(tree, target), meta

    @property
    def _corrupt(self) -> epath.Path:
        return self._directory.parent.parent / "corrupt"

    def _set_aside(self, step: int) -> None:
        barrier("corrupt-checkpoint")
        if jax.process_index() == 0:
            aside = self._corrupt / f"{self._directory.name}-{step}"
            while aside.exists():
                aside = aside.parent / (aside.name + "x")
            move_folder(self._directory / str(step), aside)
        barrier("corrupt-checkpoint-moved")
        self._manager.close()
        self._manager = self._open()

    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def remove_folder(directory: epath.Path) -> None:
    """Deletes a folder and all in it; a folder that is already gone is fine."""
    if directory.exists():
        directory.rmtree()


def _raw_target(leaf: Any) -> Any:
    if not is_key(leaf):
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return leaf if leaf.size else jax.ShapeDtypeStruct((1,), leaf.dtype, sharding=whole)
    shape = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=leaf.sharding)


def _check_leaves(target: Any, written: dict[str, Any], where: epath.Path) -> None:
    wanted = {path_name(p): (list(x.shape), str(x.dtype)) for p, x in jax.tree.leaves_with_path(target)}
    found = {name: (leaf["shape"], leaf["dtype"]) for name, leaf in written.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where} does not fit this run: {name} is {found.get(name, 'missing')} there and "
                f"{wanted.get(name, 'not wanted')} here. Use the code and config it was made with, or a new workdir."
            )
