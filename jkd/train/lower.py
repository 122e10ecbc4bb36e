"""Lowering the steps of a run for any mesh without running anything: what plans are made from."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.nn.platform import tracing_for
from jkd.train.checkpoint import is_key
from jkd.train.ensemble import previous_of, stack
from jkd.train.flops import count_flops
from jkd.train.mesh import DEFAULT_RULES, Rules, check_batch_size, tree_shardings
from jkd.train.passes import batch_axis
from jkd.train.program import Plan, abstract, crossed_shapes, plan_stage, split_key, step_program
from jkd.train.stage import Outcome, Stage, check_stages


class LoweredStage(NamedTuple):
    """The step program of one stage, ready to be compiled.

    Attributes:
      name: of the stage.
      lowered: its step, for the mesh.
      batch_size: of the global batch, all members of a vectorized ensemble counted; 0 without data.
      programs: how often the loop calls the program in one step (the members of a looped ensemble).
      num_examples: rows that the stage trains on; 0 without data.
      model_flops: of one call for the global batch, as the step is written; see `jkd.train.flops`.
    """

    name: str
    lowered: Any
    batch_size: int
    programs: int
    num_examples: int
    model_flops: float


def lower_stages(
    stages: Sequence[Stage],
    mesh: Mesh,
    *,
    only: Collection[str] | None = None,
    rules: Rules = DEFAULT_RULES,
    log_every: int = 50,
) -> Iterator[LoweredStage]:
    """Lowers the step of every stage that has steps (or of some), exactly as `run` would jit it on this mesh.

    Nothing is trained; see `abstract_stages`.
    """
    for found in abstract_stages(stages, mesh, only=only, rules=rules):
        if has_steps(found.stage) and (only is None or found.stage.name in only):
            yield _lower(found.stage, found.source, found.plan, found.key, mesh, rules, log_every)


class AbstractStage(NamedTuple):
    """One stage of which nothing is computed; of a looped ensemble, what its program for one member sees.

    Attributes:
      stage: itself.
      source: of its batches, or None.
      key: its key.
      previous: the outcomes that it needs, zeros.
      plan: its state, batch, constants and resident arrays as shapes, and the state's layout.
    """

    stage: Stage
    source: Any
    key: Any
    previous: Mapping[str, Outcome]
    plan: Plan


def abstract_stages(
    stages: Sequence[Stage], mesh: Mesh, *, only: Collection[str] | None = None, rules: Rules = DEFAULT_RULES
) -> Iterator[AbstractStage]:
    """Yields the stages (or some, and those that they need) as the loop would lay them out on this mesh.

    Earlier stages' outcomes and the rows of sweeps are zeros of the right shapes, and `prepare` runs on them.
    """
    check_stages(stages)
    outcomes: dict[str, Outcome] = {}
    for stage in _needed(stages, only):
        previous = {name: outcomes[name] for name in stage.needs}
        key = jax.random.key(0) if stage.key is None else stage.key
        consts = _zeros(jax.eval_shape(lambda x: x, _prepared(stage, key, previous)))
        one_key, one_previous, one_consts = key, previous, consts
        if stage.looped:
            one_key, one_previous = key[0], previous_of(previous, 0, stage.members)
            one_consts = jax.tree.map(lambda x: x[0], consts)
        source = stage.data(one_consts)
        plan = plan_stage(stage, source, split_key(one_key)[1], one_previous, one_consts, mesh, rules)
        yield AbstractStage(stage, source, one_key, one_previous, plan)
        views = (stage.publish, stage.snapshot or stage.publish)
        published, kept = (_zeros(jax.eval_shape(view, plan.carry.state)) for view in views)
        if stage.looped:
            published, kept = _repeated((published, kept), stage.members)
        snapshots = dict.fromkeys(stage.snapshots, kept)
        outcomes[stage.name] = Outcome(published, snapshots, consts, {}, stage.members)


def has_steps(stage: Stage) -> bool:
    """Whether there is a program to plan for."""
    return stage.has_steps and stage.step is not None


def _needed(stages: Sequence[Stage], only: Collection[str] | None) -> list[Stage]:
    wanted = {s.name for s in stages} if only is None else set(only)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [s for s in stages if s.name in wanted]


def _zeros(tree: Any) -> Any:
    # Zeros that take no memory, however large a teacher is.
    def zeros(x: Any) -> Any:
        if is_key(x):
            return jax.random.split(jax.random.key(0), math.prod(x.shape)).reshape(x.shape)
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)

    return jax.tree.map(zeros, tree)


def _repeated(tree: Any, members: int) -> Any:
    return jax.tree.map(lambda x: np.broadcast_to(x, (members, *x.shape)), tree)


def _prepared(stage: Stage, key: jax.Array, previous: Mapping[str, Outcome]) -> Any:
    prepare_key = split_key(key)[0]
    if not stage.looped:
        return stage.prepare(prepare_key, previous, _blank_sweep)
    each = (previous_of(previous, k, stage.members) for k in range(stage.members))
    return stack([stage.prepare(prepare_key[k], p, _blank_sweep) for k, p in enumerate(each)])


def _blank_sweep(fn: Callable, args: Any, source: Any, key: jax.Array | None = None) -> Any:
    batch = jax.eval_shape(source.assemble, abstract(source.resident), crossed_shapes(source))
    rows = jax.eval_shape(fn, args, batch, key)
    full = source.num_examples // source.batch_size * source.batch_size
    count = source.num_examples if source.seed is None else full
    return jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), rows)


def _lower(stage: Stage, source: Any, plan: Plan, key: Any, mesh: Mesh, rules: Rules, log_every: int) -> LoweredStage:
    axis, assemble, images, examples = 0, None, 0, 0
    if source is not None:
        check_batch_size(source.batch_size, mesh)
        axis, assemble, examples = batch_axis(source), source.assemble, source.num_examples
        images = source.batch_size * (stage.members if stage.members and not stage.looped else 1)
    whole = NamedSharding(mesh, P())
    step_key = split_key(key)[2]
    program = step_program(stage.step, assemble, axis, log_every, mesh, tuple(rules))  # type: ignore[arg-type]
    args = (
        plan.carry,
        plan.crossed,
        _laid_out(abstract(plan.consts), tree_shardings(plan.consts, mesh, rules)),
        plan.resident and _laid_out(plan.resident, jax.tree.map(lambda x: whole, plan.resident)),
        jax.ShapeDtypeStruct(step_key.shape, step_key.dtype, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
    with tracing_for(mesh.devices.flat[0].platform):
        traced = program.jitted(*args).trace(*args)
    programs = stage.members if stage.looped else 1
    return LoweredStage(stage.name, traced.lower(), images, programs, examples, count_flops(traced.jaxpr))


def _laid_out(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
