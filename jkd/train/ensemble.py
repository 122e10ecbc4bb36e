"""Several seeds of one stage as one stage."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.errors import UserError, unknown
from jkd.train.caches import cached
from jkd.train.stage import Evaluator, Outcome, Stage

MODES = ("vmap", "unroll", "loop")


def ensemble(stage: Stage, keys: jax.Array, mode: str = "vmap") -> Stage:
    """Makes K seeds of a stage one stage: every array of its state, consts and metrics gains a leading axis K.

    Args:
      stage: any stage without a key of its own.
      keys: K typed PRNG keys; member k is the single run with the stage key `keys[k]`. Stages that are given
        the same keys are paired: equal keys draw equal splits and initial parameters.
      mode: "vmap" runs all members in one vectorized program; "unroll" in one program with K copies of the
        step; "loop" calls the program of the single run K times, and is the only one that equals single runs
        bit for bit. Dense nets are fastest under vmap; on CPU, convolutions are slowest there: measure.

    A needed stage that is an ensemble of K is paired member by member, a single one is shared by all members.
    `prepare` and `finish` run member by member.

    Raises:
      UserError: for an unknown mode, or keys that are not an array of K >= 1 keys.
    """
    if mode not in MODES:
        raise unknown("ensemble mode", mode, MODES)
    if jnp.ndim(keys) != 1 or not len(keys):
        raise UserError(f"ensemble(keys=...) takes an array of K >= 1 PRNG keys, got shape {jnp.shape(keys)}.")
    looped = dataclasses.replace(stage, key=keys, members=len(keys), looped=True)
    if mode == "loop":
        return looped
    batched = _vmap if mode == "vmap" else _unroll
    return dataclasses.replace(
        looped,
        looped=False,
        prepare=functools.partial(_prepare, stage),
        data=functools.partial(_data, stage, len(keys)),
        init=functools.partial(_init, stage, batched, len(keys)),
        step=stage.step and _lift(stage.step, batched, len(keys), (0, 0, 0, 0, None)),
        publish=_lift(stage.publish, batched, len(keys), (0,)),
        snapshot=stage.snapshot and _lift(stage.snapshot, batched, len(keys), (0,)),
        evaluators={n: _evaluator(e, batched, len(keys)) for n, e in stage.evaluators.items()},
    )


def member(tree: Any, k: int) -> Any:
    """The k-th member of a tree with a leading axis of members."""
    return jax.tree.map(lambda x: x[k], tree)


def stack(trees: Sequence[Any]) -> Any:
    """Joins the members' trees along a new leading axis (arrays of keys too)."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def previous_of(previous: Mapping[str, Outcome], k: int, members: int) -> dict[str, Outcome]:
    """What member k sees of the needed stages: its own member of an ensemble, or the one shared outcome.

    Raises:
      UserError: if a needed ensemble has another number of members.
    """
    chosen = {}
    for name, outcome in previous.items():
        if outcome.members not in (0, members):
            raise UserError(
                f"An ensemble of {members} needs stage {name!r}, an ensemble of {outcome.members}; "
                f"give both the same number of keys."
            )
        chosen[name] = dataclasses.replace(member(outcome, k), members=0) if outcome.members else outcome
    return chosen


def _vmap(fn: Callable, members: int, in_axes: Sequence[Any]) -> Callable:
    return jax.vmap(fn, in_axes=tuple(in_axes))


def _unroll(fn: Callable, members: int, in_axes: Sequence[Any]) -> Callable:
    def unrolled(*args: Any) -> Any:
        def pick(axes: Any, tree: Any, k: int) -> Any:
            if isinstance(axes, dict):
                return {name: pick(axes[name], tree[name], k) for name in tree}
            return tree if axes is None else member(tree, k)

        return stack([fn(*(pick(a, x, k) for a, x in zip(in_axes, args, strict=True))) for k in range(members)])

    return unrolled


def _prepare(stage: Stage, keys: Any, previous: Mapping[str, Outcome], sweep: Callable) -> Any:
    return stack([stage.prepare(keys[k], previous_of(previous, k, len(keys)), sweep) for k in range(len(keys))])


def _data(stage: Stage, members: int, consts: Any) -> Any:
    return _stacked_source(stage.data, members, consts)


def _stacked_source(make: Callable, members: int, consts: Any) -> Any:
    sources = [make(member(consts, k)) for k in range(members)]
    return None if sources[0] is None else StackedSource(sources)


def _init(stage: Stage, batched: Callable, members: int, keys: Any, previous: Any, consts: Any) -> Any:
    axes = {}
    for name, outcome in previous.items():
        previous_of({name: outcome}, 0, members)
        axes[name] = 0 if outcome.members else None

    def init(key: Any, previous: Any, consts: Any) -> Any:
        singles = {n: dataclasses.replace(o, members=0) for n, o in previous.items()}
        return stage.init(key, singles, consts)

    return batched(init, members, (0, axes, 0))(keys, previous, consts)


@cached
def _lift(fn: Callable, batched: Callable, members: int, in_axes: tuple) -> Callable:
    # Cached, so that stages with one step, publish or collect function share its compiled program.
    return batched(fn, members, in_axes)


def _evaluator(evaluator: Evaluator, batched: Callable, members: int) -> Evaluator:
    def finish(tree: Any) -> dict[str, np.ndarray]:
        results = [evaluator.finish(jax.tree.map(lambda x, k=k: x[k], tree)) for k in range(members)]
        return {name: np.asarray([r[name] for r in results]) for name in results[0]}

    def source(consts: Any) -> Any:
        if callable(evaluator.source):
            return _stacked_source(evaluator.source, members, consts)
        return StackedSource([evaluator.source] * members)

    def draw(tree: Any) -> dict[str, Any]:
        assert evaluator.draw is not None
        return by_seed([evaluator.draw(member(tree, k)) for k in range(members)])

    def warn(values: Mapping[str, Any]) -> str | None:
        assert evaluator.warn is not None
        each = [evaluator.warn({name: value[k] for name, value in values.items()}) for k in range(members)]
        return "; ".join(f"seed {k}: {text}" for k, text in enumerate(each) if text) or None

    lifted: dict[str, Any] = {"draw": evaluator.draw and draw, "warn": evaluator.warn and warn}
    collect = _lift(evaluator.collect, batched, members, (0, 0, 0, None))
    return dataclasses.replace(evaluator, source=source, collect=collect, finish=finish, **lifted)


def by_seed(pictures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pictures of an ensemble's members, each under its name and seed."""
    return {f"{name}-seed{k}": picture for k, of in enumerate(pictures) for name, picture in of.items()}


@cached
def _stacked_assemble(assemble: Callable, shared: bool) -> Callable:
    return jax.vmap(assemble, in_axes=(None if shared else 0, 0))


class StackedSource:
    """The sources of an ensemble's members side by side: batches gain a leading axis of members.

    Members over one set share its resident arrays; only their indices differ.
    """

    batch_axis = 1

    def __init__(self, sources: Sequence[Any]):
        first = sources[0]
        for other in sources[1:]:
            if (other.num_examples, other.batch_size) != (first.num_examples, first.batch_size):
                raise UserError(
                    "The members of an ensemble need sources of one size: "
                    f"{other.num_examples} examples in batches of {other.batch_size} beside "
                    f"{first.num_examples} in batches of {first.batch_size}."
                )
        self._sources = list(sources)
        self.num_examples, self.batch_size = first.num_examples, first.batch_size
        self.num_batches, self.prefetch, self.seed = first.num_batches, first.prefetch, first.seed
        shared = all(s.resident is first.resident for s in sources)
        self.resident = first.resident if shared else stack([s.resident for s in sources])
        self.assemble = _stacked_assemble(first.assemble, shared)

    def in_order(self, batch_size: int | None = None) -> "StackedSource":
        """The members' rows in order, as one pass."""
        return StackedSource([s.in_order(batch_size) for s in self._sources])

    def local(self, t: int, rows: np.ndarray | None = None) -> Any:
        """What crosses to the device at step t: the members' parts, stacked."""
        parts = [s.local(t, rows) for s in self._sources]
        return jax.tree.map(lambda *xs: np.stack(xs), *parts)

    def iterate(self, start: int, stop: int, rows: np.ndarray | None = None) -> Iterator[Any]:
        """`local(t, rows)` for t in start..stop-1."""
        members = [s.iterate(start, stop, rows) for s in self._sources]
        for parts in zip(*members, strict=True):
            yield jax.tree.map(lambda *xs: np.stack(xs), *parts)

    def batch(self, t: int) -> Any:
        """The whole batch of step t, [members, batch, ...]."""
        return self.assemble(self.resident, self.local(t))
