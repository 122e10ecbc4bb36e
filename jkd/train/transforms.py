"""Stages that are made of stages: less memory for the same step, and averages of what a stage publishes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jkd.errors import UserError, unknown
from jkd.train.caches import cached
from jkd.train.gradient import SAVED, is_floating
from jkd.train.stage import Stage

AVERAGES = ("ema", "mean")


def microbatch(stage: Stage, parts: int) -> Stage:
    """The stage whose step takes its batch in `parts` equal micro-batches, one after the other, with one update.

    Activations take 1 / `parts` of the memory. The step is the same where the loss is a mean over examples; batch
    normalization sees micro-batches (its running statistics move once a step, by the parts' mean).

    Raises:
      UserError: if the stage's step is no `ModelStep` (or other dataclass with a field `microbatches`).
    """
    if parts < 1:
        raise UserError(f"microbatches must be >= 1, got {parts}.")
    return _with_step(stage, "microbatch", microbatches=parts)


def remat(stage: Stage, saved: Sequence[str] = SAVED) -> Stage:
    """The stage whose backward pass computes again what the forward pass has not `saved` by name.

    The models of `jkd.nn` name the outputs of their blocks and their logits; () keeps nothing but the inputs. The same
    numbers (to rounding) for about a third more FLOPs, and memory for one block's activations beside the saved ones.

    Raises:
      UserError: if the stage's step is no `ModelStep` (or other dataclass with a field `saved`).
    """
    return _with_step(stage, "remat", saved=tuple(saved))


def _with_step(stage: Stage, name: str, **changes: Any) -> Stage:
    fields = {f.name for f in dataclasses.fields(stage.step)} if dataclasses.is_dataclass(stage.step) else set()
    if not changes.keys() <= fields:
        raise UserError(
            f"{name} changes a step that is a train.ModelStep; that of stage {stage.name!r} is a "
            f"{type(stage.step).__name__}. Apply it before train.ensemble and train.average."
        )
    return dataclasses.replace(stage, step=dataclasses.replace(stage.step, **changes))  # type: ignore[type-var]


def average(stage: Stage, kind: str = "ema", *, decay: float = 0.999, start: int = 0) -> Stage:
    """The stage that publishes an average over its steps of what it would publish, in float32 at least.

    From step t = `start` on, with k = t - start, new values x move the average a by a += w (x - a):

        "ema"   w = 1 - min(decay, (1 + k) / (10 + k)), so that the first values are soon forgotten
        "mean"  w = 1 / (1 + k), the plain mean (stochastic weight averaging, Izmailov et al., UAI 2018)

    Before `start`, the average is the newest value; a stage that begins later (`first_step`) counts k from its own
    first step. A `Stage.snapshot` is taken of the state without the average. Integers and keys are never averaged.
    Running statistics of batch normalization are averaged with the parameters; they are not measured again with the
    averaged ones.

    Raises:
      UserError: for another kind, a decay outside [0, 1), or a negative start.
    """
    if kind not in AVERAGES:
        raise unknown("average", kind, AVERAGES)
    if not 0 <= decay < 1 or start < 0:
        raise UserError(f"average takes decay in [0, 1) and start >= 0, got decay={decay}, start={start}.")
    return dataclasses.replace(
        stage,
        init=_averaged_init(stage.init, stage.publish),
        step=stage.step and _averaged_step(stage.step, stage.publish, kind, decay, max(start, stage.first_step)),
        publish=_averaged_publish(stage.publish),
        snapshot=stage.snapshot and _inner(stage.snapshot),
    )


# Cached, so that stages with one step and publish function share their compiled programs.


@cached
def _averaged_init(init: Callable, publish: Callable) -> Callable:
    def start(key: Any, previous: Any, consts: Any) -> dict[str, Any]:
        state = init(key, previous, consts)
        return {"state": state, "average": jax.tree.map(_wide, publish(state))}

    return start


@cached
def _averaged_step(step: Callable, publish: Callable, kind: str, decay: float, start: int) -> Callable:
    def averaged(key: Any, state: dict[str, Any], consts: Any, batch: Any, t: Any) -> tuple[dict[str, Any], Any]:
        new, metrics = step(key, state["state"], consts, batch, t)
        k = jnp.maximum(t - start, 0).astype(jnp.float32)
        weight = 1 - jnp.minimum(decay, (1 + k) / (10 + k)) if kind == "ema" else 1 / (1 + k)
        weight = jnp.where(t < start, 1.0, weight)

        def move(old: jax.Array, x: jax.Array) -> jax.Array:
            return old + weight.astype(old.dtype) * (x - old) if is_floating(x) else x

        return {"state": new, "average": jax.tree.map(move, state["average"], publish(new))}, metrics

    return averaged


@cached
def _averaged_publish(publish: Callable) -> Callable:
    def published(state: dict[str, Any]) -> Any:
        return jax.tree.map(lambda a, x: a.astype(x.dtype), state["average"], publish(state["state"]))

    return published


@cached
def _inner(snapshot: Callable) -> Callable:
    def taken(state: dict[str, Any]) -> Any:
        return snapshot(state["state"])

    return taken


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_floating(x) else x
