"""The compiled step of a stage: batch assembly, the method's step, and the account of its metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jkd.errors import UserError
from jkd.train.caches import cached
from jkd.train.checkpoint import check_plain, is_key
from jkd.train.mesh import Rules, jit_step, replicate, tree_shardings
from jkd.train.passes import batch_axis, evaluation_source
from jkd.train.stage import Stage


class Report(NamedTuple):
    """The metrics of the current log window, and the first step whose metrics were not finite.

    Attributes:
      sums: the sum of every metric since the last log step.
      count: the number of steps in these sums.
      bad_step: the first step t with a non-finite metric, -1 while there is none.
      bad: the metrics of that step.
    """

    sums: Any
    count: Any
    bad_step: Any
    bad: Any


class Carry(NamedTuple):
    """What a stage carries from step to step: the method's state and the loop's report."""

    state: Any
    report: Report


def split_key(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys for prepare, init and steps; of an ensemble's keys, every member's."""
    if key.ndim:
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(key)
        return keys[:, 0], keys[:, 1], keys[:, 2]
    prepare, init, step = jax.random.split(key, 3)
    return prepare, init, step


def _fold(key: jax.Array, t: Any) -> jax.Array:
    if key.ndim:
        return jax.vmap(lambda k: jax.random.fold_in(k, t))(key)
    return jax.random.fold_in(key, t)


def _account(report: Report, metrics: Any, t: Any, log_every: int) -> Report:
    fresh = t % log_every == 0
    finite = jnp.all(jnp.stack([jnp.isfinite(m).all() for m in jax.tree.leaves(metrics)] or [True]))
    newly = (report.bad_step < 0) & ~finite
    return Report(
        jax.tree.map(lambda s, m: jnp.where(fresh, 0, s) + m.astype(s.dtype), report.sums, metrics),
        jnp.where(fresh, 0, report.count) + 1,
        jnp.where(newly, t, report.bad_step),
        jax.tree.map(lambda b, m: jnp.where(newly, m.astype(b.dtype), b), report.bad, metrics),
    )


def _strong(state: Any) -> Any:
    # jnp.asarray(0.0) is weakly typed: a state that changes between weak and strong would compile twice.
    return jax.tree.map(lambda x: x if is_key(x) else jax.lax.convert_element_type(x, jnp.result_type(x)), state)


def make_carry(state: Any, metrics: Any) -> Carry:
    """The carry at step 0 for metrics of the given shapes."""
    zeros = {n: jnp.zeros(m.shape, jnp.promote_types(m.dtype, jnp.float32)) for n, m in metrics.items()}
    return Carry(_strong(state), Report(zeros, jnp.int32(0), jnp.int32(-1), dict(zeros)))


@cached
def step_program(
    step: Callable, assemble: Callable | None, axis: int, log_every: int, mesh: Mesh, rules: Rules
) -> jit_step:
    """The jitted `(carry, crossed, consts, resident, key, t) -> (carry, report)`.

    Stages that share a step function and a kind of source share it, and its compiled form where shapes agree.
    """

    def program(carry: Carry, crossed: Any, consts: Any, resident: Any, key: Any, t: Any):
        batch = None if assemble is None else assemble(resident, crossed)
        state, metrics = step(_fold(key, t), carry.state, consts, batch, t)
        metrics = jax.tree.map(jnp.asarray, metrics)
        report = _account(carry.report, metrics, t, log_every)
        return Carry(_strong(state), report), report

    return jit_step(program, mesh, rules=carry_rules(rules), batch_axis=axis)


def carry_rules(rules: Rules) -> Rules:
    """The rules of a carry: the loop's report is whole everywhere, whatever its metrics are called."""
    return (("^report/", replicate), *rules)


def abstract(tree: Any) -> Any:
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def crossed_shapes(source: Any) -> Any:
    """The shapes of what crosses to the device for one GLOBAL batch, from a single row of it."""
    axis = batch_axis(source)

    def whole(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        if len(shape) > axis:
            shape[axis] = source.batch_size
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return jax.tree.map(whole, source.local(0, np.arange(1)))


def check_metrics(stage: Stage, metrics: Any, source: Any) -> None:
    """Raises UserError unless a step's metrics are a dict of scalars (one a member in an ensemble)."""
    shape = (stage.members,) if stage.members and not stage.looped else ()
    if not isinstance(metrics, dict):
        raise UserError(f"Stage {stage.name!r}: step must return a dict of metrics, got {type(metrics).__name__}.")
    for name, value in metrics.items():
        if getattr(value, "shape", None) != shape:
            raise UserError(
                f"Stage {stage.name!r}: metric {name!r} must be a scalar, got shape "
                f"{getattr(value, 'shape', type(value).__name__)}; reduce it in the step."
            )


def check_state(stage: Stage, before: Any, after: Any) -> None:
    """Raises UserError unless a step returns a state of the same structure, shapes and dtypes."""
    structures = [jax.tree.structure(tree) for tree in (before, after)]
    if structures[0] != structures[1]:  # type: ignore[operator]
        raise UserError(f"Stage {stage.name!r}: step returns a state of another structure than init.")
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"Stage {stage.name!r}: step changes the state's {jax.tree_util.keystr(path)} from "
                f"{old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}."
            )


def evaluation_sources(stage: Stage, state: Any, consts: Any, mesh: Mesh) -> dict[str, Any]:
    """The evaluators' sources, made once a stage.

    Traces every `collect` abstractly, so that its mistakes show before the training and not after it.
    """
    published = jax.eval_shape(stage.publish, state)
    sources = {name: evaluation_source(evaluator, consts, mesh) for name, evaluator in stage.evaluators.items()}
    for name, evaluator in stage.evaluators.items():
        source = sources[name]
        batch = jax.eval_shape(source.assemble, abstract(source.resident), crossed_shapes(source))
        mask = jax.ShapeDtypeStruct((source.batch_size,), jnp.bool_)
        jax.eval_shape(evaluator.collect, published, consts, batch, mask)
    return sources


class Plan(NamedTuple):
    """Abstract values of one stage (of one member of a looped ensemble): what its program is compiled for."""

    carry: Any
    crossed: Any
    consts: Any
    resident: Any
    shardings: Any


def plan_stage(stage: Stage, source: Any, key: Any, previous: Any, consts: Any, mesh: Mesh, rules: Rules) -> Plan:
    """Traces `init` and `step` abstractly, checks what they return, and lays out the state on the mesh."""
    state = jax.eval_shape(stage.init, key, previous, consts)
    crossed = resident = batch = None
    if source is not None:
        crossed, resident = crossed_shapes(source), abstract(source.resident)
        batch = jax.eval_shape(source.assemble, resident, crossed)
    metrics: Any = {}
    if stage.has_steps and stage.step is not None:
        t = jax.ShapeDtypeStruct((), jnp.int32)
        after, metrics = jax.eval_shape(stage.step, key, state, consts, batch, t)
        check_metrics(stage, metrics, source)
        check_state(stage, state, after)
    check_plain(jax.eval_shape(stage.publish, state), f"Stage {stage.name!r}: publish")
    if stage.snapshot is not None:
        check_plain(jax.eval_shape(stage.snapshot, state), f"Stage {stage.name!r}: snapshot")
    carry = jax.eval_shape(make_carry, state, metrics)
    return Plan(carry, crossed, consts, resident, tree_shardings(carry, mesh, carry_rules(rules)))
