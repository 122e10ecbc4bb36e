"""The gradient of a loss over a batch: at once, in micro-batches, with parts of the forward pass computed twice."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jkd.errors import UserError
from jkd.train.remat import rematerialized

SAVED = ("block", "logits")  # what the models of jkd.nn name with `checkpoint_name`


class Aux(NamedTuple):
    """What a loss may return beside its value: scalars to log, and the model's new other variables."""

    metrics: dict[str, Any]
    model_state: Any = None


def value_and_grad(
    loss_fn: Callable, *, microbatches: int = 1, saved: Sequence[str] | None = None
) -> Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, Aux], Any]]:
    """Makes `(params, batch, key) -> ((loss, Aux), gradient)` from a loss.

    Args:
      loss_fn: `loss_fn(params, batch, key)` returns a scalar, or `(scalar, Aux)`; a mean over the batch.
      microbatches: n > 1 splits the batch into n parts, one after the other, whose losses, metrics, model states and
        gradients are averaged. That is the gradient of the whole batch where the loss is a mean over examples; what
        looks across examples (batch statistics, contrastive losses, a random permutation) sees a part only. Part i
        gets `fold_in(key, i)`, and every n-th example, so that every device has its share of each part.
      saved: names of the intermediate values that are kept for the backward pass, which computes the others again (see
        `jkd.train.remat.rematerialized`); None keeps all that it needs.

    Raises:
      UserError: if `microbatches` is below 1 or does not divide the batch.
    """
    if microbatches < 1:
        raise UserError(f"microbatches must be >= 1, got {microbatches}.")

    def with_aux(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Aux]:
        out = loss_fn(params, batch, key)
        return out if isinstance(out, tuple) else (out, Aux({}))

    forward = with_aux if saved is None else rematerialized(with_aux, saved)
    whole = jax.value_and_grad(forward, has_aux=True)
    return whole if microbatches == 1 else _accumulated(whole, microbatches)


def _accumulated(whole: Callable, parts: int) -> Callable:
    def accumulated(params: Any, batch: Any, key: jax.Array) -> Any:
        batches = jax.tree.map(lambda x: _split(x, parts), batch)

        def part(i: Any) -> Any:
            return whole(params, jax.tree.map(lambda x: x[i], batches), jax.random.fold_in(key, i))

        def add(sums: Any, i: Any) -> tuple[Any, None]:
            return jax.tree.map(_add, sums, part(i)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0))
        sums, _ = jax.lax.scan(add, zeros, jnp.arange(parts))
        return jax.tree.map(lambda x: x / parts if is_floating(x) else x, sums)

    return accumulated


def _split(x: jax.Array, parts: int) -> jax.Array:
    if len(x) % parts:
        raise UserError(f"A batch of {len(x)} examples cannot be split into microbatches={parts} equal parts.")
    return jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1)


def is_floating(x: Any) -> bool:
    """Whether an array holds numbers that can be averaged; counters and keys cannot."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def _add(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x if is_floating(x) else x  # a counter in the model's state counts steps
