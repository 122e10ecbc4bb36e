"""Meshes, sharding rules and the one place where a step is jitted."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jkd.errors import UserError
from jkd.trees import path_name

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")  # a batch is split over all of these

Rule = Callable[[tuple[int, ...], Mesh], P]
Rules = Sequence[tuple[str, Rule]]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes the mesh (slice, data, fsdp, tensor) over `devices`, all axes Auto.

    Args:
      data: ways to split the batch; -1 takes what the other axes leave.
      fsdp: ways to split the batch and the parameters (fully sharded data parallelism).
      tensor: ways to split single layers.
      slices: number of TPU slices that are joined by the data-center network; splits the batch too.
      devices: by default, all devices of all processes.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"slice": slices, "data": data, "fsdp": fsdp, "tensor": tensor}
    if data == -1 and min(slices, fsdp, tensor) > 0:
        sizes["data"] = max(1, len(devices) // (slices * fsdp * tensor))
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"The mesh {asked} needs {math.prod(sizes.values())} devices, but there are {len(devices)}. "
            "Set mesh.data=-1 to use what the other axes leave; they must divide the number of devices."
        )
    shape = tuple(sizes[name] for name in AXES)
    if slices > 1:
        try:
            array = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1, 1), devices)
        except ValueError as error:
            raise UserError(f"mesh.slices={slices} does not fit these devices: {error}") from error
        return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicate(shape: tuple[int, ...], mesh: Mesh) -> P:
    """The rule that keeps a whole copy on every device."""
    return P()


def fsdp(*, min_size: int = 2**14) -> Rule:
    """The rule that splits the largest dimension that the `fsdp` axis divides; small arrays stay whole."""

    def rule(shape: tuple[int, ...], mesh: Mesh) -> P:
        ways = mesh.shape["fsdp"]
        fitting = [size for size in shape if size % ways == 0]
        if ways == 1 or math.prod(shape) < min_size or not fitting:
            return P()
        return P(*(None,) * shape.index(max(fitting)), "fsdp")

    return rule


def shard(dimension: int, axis: str = "tensor") -> Rule:
    """The rule that splits one dimension (negative ones count from the end) over one mesh axis."""

    def rule(shape: tuple[int, ...], mesh: Mesh) -> P:
        if not -len(shape) <= dimension < len(shape) or shape[dimension] % mesh.shape[axis]:
            raise UserError(
                f"shard({dimension}, {axis!r}) does not fit an array of shape {shape}: the dimension must "
                f"exist and be divisible by {mesh.shape[axis]}."
            )
        return P(*(None,) * (dimension % len(shape)), axis)

    return rule


def shard_rows(shape: tuple[int, ...], mesh: Mesh) -> P:
    """The rule that splits the rows of matrices over the devices that share a batch, where they divide the rows.

    Rows are the last but one dimension, behind the members of an ensemble.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if len(shape) < 2 or shape[-2] % ways:
        return P()
    return P(*(None,) * (len(shape) - 2), BATCH_AXES)


# Below "by_row" a whole-set step keeps what has a row for each example.
DEFAULT_RULES: Rules = (("(^|/)by_row/", shard_rows), (".*", fsdp()))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The sharding of every leaf: the first rule whose regex is found in the leaf's path decides.

    Optimizer states repeat the paths of the parameters, so they follow the same rules.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(path_name(path), tuple(np.shape(leaf)), mesh, rules), tree
    )


def sharding_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of the leaf `name`: of the first rule whose regex is found in it, else whole everywhere."""
    for pattern, rule in rules:
        if re.search(pattern, name):
            return NamedSharding(mesh, rule(shape, mesh))
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, leaf: Any, batch_axis: int = 0) -> NamedSharding:
    """The sharding of one array of a batch: its `batch_axis` split over slice, data and fsdp."""
    if np.ndim(leaf) <= batch_axis:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*(None,) * batch_axis, BATCH_AXES))


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
    """Raises UserError unless the mesh can split a global batch of this size evenly."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % ways:
        raise UserError(
            f"{name} {batch_size} is not divisible by the {ways} devices that share a batch "
            f"(slice x data x fsdp); use a multiple of {ways}, or a smaller mesh.data."
        )


def place(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Puts host arrays (the same on every process) onto the mesh, sharded by the rules."""
    return jax.tree.map(place_leaf, tree, tree_shardings(tree, mesh, rules))


def place_leaf(leaf: Any, sharding: Sharding) -> jax.Array:
    """One host array (the same on every process), or array from another mesh, as an array of this sharding."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = place_leaf(jax.random.key_data(leaf), sharding)  # numpy holds no keys
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@functools.lru_cache(maxsize=256)
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray | None:
    """The rows of a global batch that this process's devices hold, ascending; None: all, in a single process.

    The mesh decides: devices of one process need not be neighbors on its axes.
    """
    if jax.process_count() == 1:
        return None
    pieces = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[piece] for piece in pieces]))


def cross(crossed: Any, mesh: Mesh, batch_size: int, batch_axis: int = 0) -> Any:
    """Hands the `local_rows` of a batch to a jitted step, as arrays of the global batch."""
    rows = local_rows(mesh, batch_size)
    if rows is None:
        return crossed  # jit places host arrays faster than anything we could do here

    def whole(x: np.ndarray) -> jax.Array:
        if x.ndim <= batch_axis:
            return jax.make_array_from_callback(x.shape, batch_sharding(mesh, x, batch_axis), lambda index: x[index])
        shape = (*x.shape[:batch_axis], batch_size, *x.shape[batch_axis + 1 :])

        def piece(index: Any) -> np.ndarray:
            first, last, _ = index[batch_axis].indices(batch_size)
            start = int(np.searchsorted(rows, first))  # a device's rows are neighbors here too
            return x[(slice(None),) * batch_axis + (slice(start, start + last - first),)]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, x, batch_axis), piece)

    return jax.tree.map(whole, crossed)


def readable(tree: Any, mesh: Mesh) -> Any:
    """The tree with every array whole on every process, so that the host can read it."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return place_leaf(x, NamedSharding(mesh, P()))

    return jax.tree.map(leaf, tree)


class jit_step:
    """Jits `fn(state, batch, *rest) -> (state, out)` for a mesh: the state donated, everything sharded.

    The state is split by `rules` and stays so; the batch is split along `batch_axis`; `rest` is used where
    it lies (a key, constants placed by `place`); `out` comes back whole on every device.

        step = jit_step(make_train_step(loss_fn, optax.sgd(0.1)), make_mesh())
        state, metrics = step(state, batch, key)

    A state that does not lie on the mesh yet is copied there, so the arrays it was made from stay usable; one that
    does, such as the state that the step returned, is donated: its arrays are gone after the call. With
    `donate=False` they stay, at the price of a second state in memory.
    """

    def __init__(
        self, fn: Callable, mesh: Mesh, *, rules: Rules = DEFAULT_RULES, batch_axis: int = 0, donate: bool = True
    ):
        self._fn, self._mesh, self._rules = fn, mesh, rules
        self._batch_axis, self._donate = batch_axis, donate
        self._made: dict[Any, tuple[Any, Any]] = {}

    def _make(self, state: Any, batch: Any, rest: tuple) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten((state, batch))
        kind = (treedef, tuple(np.shape(x) for x in leaves), len(rest))
        if kind not in self._made:
            for leaf in jax.tree.leaves(batch):
                if np.ndim(leaf) > self._batch_axis:
                    check_batch_size(np.shape(leaf)[self._batch_axis], self._mesh)
            states = tree_shardings(state, self._mesh, self._rules)
            batches = jax.tree.map(lambda x: batch_sharding(self._mesh, x, self._batch_axis), batch)
            jitted = jax.jit(
                self._fn,
                in_shardings=(states, batches) + (None,) * len(rest),
                out_shardings=(states, NamedSharding(self._mesh, P())),
                donate_argnums=(0,) if self._donate else (),
            )
            self._made[kind] = jitted, states
        return self._made[kind]

    def jitted(self, state: Any, batch: Any, *rest: Any) -> Any:
        """The jitted function for arguments of these shapes, for loops that call it many times.

        The state it is given must lie on the mesh.
        """
        return self._make(state, batch, rest)[0]

    def __call__(self, state: Any, batch: Any, *rest: Any) -> tuple[Any, Any]:
        """One step on global arrays."""
        jitted, shardings = self._make(state, batch, rest)
        return jitted(jax.tree.map(_copied_unless_there, state, shardings), batch, *rest)

    def lower(self, state: Any, batch: Any, *rest: Any) -> Any:
        """Lowers without running; arguments may be `jax.ShapeDtypeStruct`s."""
        return self.jitted(state, batch, *rest).lower(state, batch, *rest)


def _copied_unless_there(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    return jax.device_put(leaf, sharding, may_alias=False)
