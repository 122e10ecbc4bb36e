"""One program's worth of a running stage."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jkd.train.mesh import check_batch_size, local_rows, place, readable
from jkd.train.program import Carry, evaluation_sources, make_carry, plan_stage, split_key
from jkd.train.stage import Outcome, Stage


class Member:
    """One program's worth of a stage: the whole stage, or one seed of a looped ensemble."""

    def __init__(self, ctx: Any, stage: Stage, key: jax.Array, previous: Mapping[str, Outcome], consts: Any):
        self.mesh, self.consts, self.previous = ctx.mesh, consts, previous
        _, self.init_key, self.step_key = split_key(key)
        self.source = stage.data(readable(consts, ctx.mesh))
        if self.source is not None:
            check_batch_size(self.source.batch_size, ctx.mesh)
        self.resident = None if self.source is None else ctx.residents(self.source)
        self.plan = plan_stage(stage, self.source, self.init_key, previous, consts, ctx.mesh, ctx.rules)
        self.evaluation_sources = evaluation_sources(stage, self.plan.carry.state, consts, ctx.mesh)
        self.step_key = place(self.step_key, ctx.mesh)
        self.carry: Any = None

    def target(self) -> Any:
        """The shapes and shardings to restore the carry into."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.plan.carry,
            self.plan.shardings,
        )

    def initializer(self, stage: Stage) -> Callable:
        """The jitted `(key, previous, consts) -> carry`, sharded from the start; one for all members of a stage."""
        metrics = self.plan.carry.report.sums

        def init(key: Any, previous: Any, consts: Any) -> Carry:
            return make_carry(stage.init(key, previous, consts), metrics)

        return jax.jit(init, out_shardings=self.plan.shardings)

    def create(self, init: Callable) -> None:
        """Initializes the carry."""
        self.carry = init(self.init_key, self.previous, self.consts)

    def crossings(self, start: int, stop: int) -> Iterator[Any]:
        """What crosses to the devices at the steps start..stop-1; None at each for a stage without data."""
        if self.source is None:
            yield from (None for _ in range(start, stop))
        else:
            yield from self.source.iterate(start, stop, local_rows(self.mesh, self.source.batch_size))
