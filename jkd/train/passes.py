"""Passes over a whole source: sweeps that prepare a stage, and evaluations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.errors import UserError
from jkd.train.caches import cached
from jkd.train.ensemble import by_seed, member
from jkd.train.mesh import (
    DEFAULT_RULES,
    Rules,
    batch_sharding,
    check_batch_size,
    cross,
    local_rows,
    place,
    readable,
    replicate,
)
from jkd.train.stage import Evaluator


class Residents:
    """The device copies of sources' resident arrays: each set is placed once, however many sources share it."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._placed: dict[int, tuple[Any, Any]] = {}
        self._used: set[int] = set()

    def next_stage(self) -> None:
        """Drops what has not been used since the last call."""
        self._placed = {name: kept for name, kept in self._placed.items() if name in self._used}
        self._used = set()

    def __call__(self, source: Any) -> Any:
        """The resident arrays of `source`, on the device."""
        arrays = source.resident
        if not jax.tree.leaves(arrays):
            return arrays
        self._used.add(id(arrays))
        if id(arrays) not in self._placed:
            self._placed[id(arrays)] = (arrays, place(arrays, self._mesh, ((".*", replicate),)))
        return self._placed[id(arrays)][1]


def batch_axis(source: Any) -> int:
    """Where the examples of a source's batches are: 1 behind the members of an ensemble, else 0."""
    return getattr(source, "batch_axis", 0)


@cached
def _rows_program(fn: Callable, assemble: Callable, mesh: Mesh, axis: int) -> Any:
    def program(args: Any, crossed: Any, resident: Any, key: Any, t: Any) -> Any:
        batch = assemble(resident, _constrain(crossed, mesh, axis))
        return fn(args, batch, None if key is None else jax.random.fold_in(key, t))

    return jax.jit(program, out_shardings=NamedSharding(mesh, P()))


def _constrain(crossed: Any, mesh: Mesh, axis: int) -> Any:
    # Batches come in as host arrays; this is where they are split over the devices.
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x, axis)), crossed)


def sweep(
    fn: Callable,
    args: Any,
    source: Any,
    key: jax.Array | None = None,
    *,
    mesh: Mesh,
    residents: Residents | None = None,
    rules: Rules = DEFAULT_RULES,
    watch: Callable[[], None] | None = None,
) -> Any:
    """Runs `fn(args, batch, key) -> rows` over one pass of a source: all rows, as numpy arrays.

    A shuffled source is visited as in training and its last partial batch dropped; a source in order gives its
    rows in that order, all of them. With a key, batch t gets `fold_in(key, t)`; without, None. `residents` holds the
    device copies of data that several passes share; `watch` is called before each batch, and stops the pass by raising.
    """
    residents = residents or Residents(mesh)
    check_batch_size(source.batch_size, mesh)
    program = _rows_program(fn, source.assemble, mesh, batch_axis(source))
    args, key = place(args, mesh, rules), None if key is None else place(key, mesh, ((".*", replicate),))
    full, rest = divmod(source.num_examples, source.batch_size)
    count = source.num_batches if source.seed is None else full
    if count == 0:
        raise UserError(
            f"A sweep over {source.num_examples} examples in batches of {source.batch_size} has no full batch; "
            "use a smaller batch_size."
        )
    rows = []
    for t, crossed in enumerate(source.iterate(0, count, local_rows(mesh, source.batch_size))):
        if watch is not None:
            watch()
        crossed = cross(crossed, mesh, source.batch_size, batch_axis(source))
        out = program(args, crossed, residents(source), key, np.int32(t))
        rows.append(jax.device_get(out))
    if source.seed is None and rest:
        rows[-1] = jax.tree.map(lambda x: x[:rest], rows[-1])
    return jax.tree.map(lambda *xs: np.concatenate(xs), *rows)


@cached
def _collect_program(collect: Callable, assemble: Callable, kind: str, size: int, mesh: Mesh, axis: int) -> Any:
    def one(published: Any, crossed: Any, consts: Any, resident: Any, start: Any, total: Any) -> Any:
        batch = assemble(resident, _constrain(crossed, mesh, axis))
        mask = jnp.arange(size) < total - start
        return collect(published, consts, batch, mask)

    def add(sums: Any, *rest: Any) -> Any:
        return jax.tree.map(jnp.add, sums, one(*rest))

    whole = NamedSharding(mesh, P())
    if kind == "gather":
        return jax.jit(one, out_shardings=whole)
    return jax.jit(one, out_shardings=whole), jax.jit(add, out_shardings=whole, donate_argnums=0)


def evaluation_source(evaluator: Evaluator, consts: Any, mesh: Mesh) -> Any:
    """The source of an evaluator, in order; UserError if the mesh cannot split its batches."""
    source = evaluator.source(readable(consts, mesh)) if callable(evaluator.source) else evaluator.source
    check_batch_size(source.batch_size, mesh)
    return source.in_order()


class Findings(NamedTuple):
    """What an evaluator found: its metrics, pictures by name, and what is to be said aloud."""

    metrics: Mapping[str, Any]
    pictures: Mapping[str, Any]
    warnings: list[str]


def _findings(evaluator: Evaluator, tree: Any) -> Findings:
    metrics = evaluator.finish(tree)
    warning = evaluator.warn(metrics) if evaluator.warn else None
    return Findings(metrics, evaluator.draw(tree) if evaluator.draw else {}, [warning] if warning else [])


def evaluate(evaluator: Evaluator, published: Any, consts: Any, **options: Any) -> Mapping[str, Any]:
    """The metrics that `examine` finds, which takes the same arguments."""
    return examine(evaluator, published, consts, **options).metrics


def examine(
    evaluator: Evaluator,
    published: Any,
    consts: Any,
    *,
    mesh: Mesh,
    residents: Residents | None = None,
    source: Any = None,
    watch: Callable[[], None] | None = None,
) -> Findings:
    """Runs one evaluator over its whole source.

    The last batch is padded by the source and masked; every batch has one shape, so that each evaluator
    compiles once. `source` is what `evaluation_source` made for these consts, where that has been done already;
    `watch` is called before each batch.
    """
    residents = residents or Residents(mesh)
    source = source or evaluation_source(evaluator, consts, mesh)
    axis, size = batch_axis(source), source.batch_size
    program = _collect_program(evaluator.collect, source.assemble, evaluator.kind, size, mesh, axis)
    total, rows, sums = np.int32(source.num_examples), [], None
    for t, crossed in enumerate(source.iterate(0, source.num_batches, local_rows(mesh, size))):
        if watch is not None:
            watch()
        args = (published, cross(crossed, mesh, size, axis), consts, residents(source), np.int32(t * size), total)
        if evaluator.kind == "gather":
            out = jax.device_get(program(*args))
            left = source.num_examples - t * size
            rows.append(jax.tree.map(lambda x, left=left: np.take(x, range(min(size, left)), axis=axis), out))
        else:
            sums = program[0](*args) if sums is None else program[1](sums, *args)
            jax.block_until_ready(sums)
    if evaluator.kind == "gather":
        return _findings(evaluator, jax.tree.map(lambda *xs: np.concatenate(xs, axis=axis), *rows))
    return _findings(evaluator, jax.device_get(sums))


def examine_members(
    evaluator: Evaluator,
    published: Any,
    consts: Sequence[Any],
    *,
    mesh: Mesh,
    residents: Residents,
    sources: Sequence[Any] | None = None,
    watch: Callable[[], None] | None = None,
) -> Findings:
    """Runs one evaluator on every member of a looped ensemble: metrics of shape [members], pictures by seed.

    `published` has a leading axis of members; `consts` holds each member's own, `sources` their evaluation sources.
    """
    sources = sources or [None] * len(consts)
    each = [
        examine(evaluator, member(published, k), own, mesh=mesh, residents=residents, source=source, watch=watch)
        for k, (own, source) in enumerate(zip(consts, sources, strict=True))
    ]
    metrics = {name: np.asarray([of.metrics[name] for of in each]) for name in each[0].metrics}
    pictures = by_seed([of.pictures for of in each])
    return Findings(metrics, pictures, [f"seed {k}: {text}" for k, of in enumerate(each) for text in of.warnings])
