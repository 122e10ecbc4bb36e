"""Creating variables and calling models purely: `params` and `model_state` in, outputs and new state out.

An `apply_fn` is `model.apply` of a linen module, what `from_nnx` returns, or any function of
`(variables, images, train=...)`; only one that has state or draws random numbers is passed `mutable` or
`rngs`. `train` is static: jit a function that calls `apply_train` or `apply_eval`, not `model.apply` itself.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key

from jkd.errors import UserError

ApplyFn = Callable[..., Any]
Variables = Mapping[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(model: nn.Module, key: Key[Array, ""], image_shape: tuple[int, ...]) -> dict[str, Any]:
    return dict(model.init(key, jnp.zeros((1, *image_shape)), train=False))


def init(model: nn.Module, key: Key[Array, ""], image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the variables {"params": ..., "batch_stats": ...} of a linen `model`, determined by `key`.

    Compiled once for equal models (fields must be hashable), and free to use under `jax.jit`,
    `jax.eval_shape` and `jax.vmap`: a loop creates its state sharded by jitting this with `out_shardings`.

    Args:
      model: a module whose call takes (images, train).
      key: a typed key.
      image_shape: of ONE example, without the batch, e.g. (32, 32, 3).

    Raises:
      UserError: where `image_shape` has a size below 1.
    """
    shape = tuple(int(size) for size in image_shape)
    if any(size < 1 for size in shape):
        raise UserError(f"image_shape must be the positive sizes of one example, got {shape}.")
    return _init(model, key, shape)


def split(variables: Variables) -> tuple[Any, dict[str, Any]]:
    """Splits variables into (params, model_state): all other collections, {} where there are none."""
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def apply_train(
    apply_fn: ApplyFn,
    params: Any,
    model_state: Variables,
    images: Any,
    rngs: Mapping[str, Key[Array, ""]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Calls a model in training mode.

    Pure and differentiable in `params`; a loss function returns the new state as its auxiliary output:

        def loss_fn(params):
            out, state = apply_train(model.apply, params, model_state, images)
            return cross_entropy(out.logits, labels).mean(), state

    Args:
      apply_fn: see the module.
      params: the parameters.
      model_state: the other collections, such as {"batch_stats": ...}; {} for a model without state.
      images: [batch, ...].
      rngs: a key for each stream that the model draws from, e.g. {"dropout": key}.

    Returns:
      (outputs, new_model_state); the new state has the structure of `model_state` and no gradient.
    """
    keys = {} if rngs is None else {"rngs": rngs}
    variables = {"params": params, **model_state}
    if not model_state:
        return apply_fn(variables, images, train=True, **keys), {}
    out, updated = apply_fn(variables, images, train=True, mutable=list(model_state), **keys)
    return out, jax.lax.stop_gradient({**model_state, **updated})


def apply_eval(apply_fn: ApplyFn, params: Any, model_state: Variables, images: Any) -> Any:
    """Calls a model in evaluation mode (running statistics, no randomness) and returns its outputs."""
    return apply_fn({"params": params, **model_state}, images, train=False)
