"""Knowledge evolution: generations of one network, each born with a part of its parent and the rest drawn anew.

What is inherited, the fit hypothesis, is chosen once, by `jkd.prune.build_masks`. Everything is trained in every
generation; only how it starts differs.

    narrower = nn.narrow(model, 0.5)
    channels = nn.shared_channels(model, narrower, image_shape)
    masks = prune.build_masks(variables["params"], channels=channels)
    history = prune.knowledge_evolution(train_fn, variables, masks, key, num_generations=5)
    slim = prune.extract_slim(history[-1], channels)  # variables of `narrower`

Taha, Shrivastava and Davis, "Knowledge evolution in neural networks", CVPR 2021.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jkd.errors import UserError
from jkd.prune.hypotheses import map_leaves, roles_of
from jkd.prune.magnitude import is_kernel
from jkd.trees import path_name

Init = Callable[..., Array]  # (key, shape, dtype) -> values
# (params, model_state, key) -> (params, model_state)
TrainFn = Callable[[Any, dict[str, Any], Key[Array, ""]], tuple[Any, dict[str, Any]]]


class Magnitudes(NamedTuple):
    """Mean absolute weights of one kernel: of those that are inherited, and of those that are drawn anew."""

    fit: Array
    reset: Array


def first_init(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """How kernels of the first generation start: N(0, 2 / fan_in).

    Args:
      key: a typed key.
      shape: [*window, inputs, outputs]; fan_in is the product of all but the outputs.
      dtype: floating.

    Reference: He et al., Delving deep into rectifiers, ICCV 2015, for ReLU.
    """
    return jax.random.normal(key, tuple(shape), dtype) * math.sqrt(2 / _fan_in(shape))


def reset_init(key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """How weights that a generation does not inherit start: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).

    Their standard deviation is 1 / sqrt(6) of that of `first_init`, as in the authors' code.

    Args:
      key: a typed key.
      shape: [*window, inputs, outputs]; fan_in is the product of all but the outputs.
      dtype: floating.
    """
    bound = _fan_in(shape) ** -0.5
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def first_generation(key: Key[Array, ""], params: Any, init_fn: Init = first_init) -> Any:
    """`params` with all kernels drawn by `init_fn`, as the first generation starts; all else stays.

    Args:
      key: determines the kernels.
      params: a tree of arrays.
      init_fn: (key, shape, dtype) -> values.
    """

    def start(index: int, role: str, path: str, leaf: Array) -> Array:
        return init_fn(jax.random.fold_in(key, index), leaf.shape, leaf.dtype) if role == "kernel" else leaf

    return map_leaves(start, roles_of(params), params)


def next_generation(key: Key[Array, ""], params: Any, masks: Any, init_fn: Init = reset_init) -> Any:
    """How the next generation starts: what the masks name is inherited, bit for bit, the rest drawn anew.

        W' = M W + (1 - M) R,    R ~ init_fn

    Pure and free to jit; with `out_shardings` every device draws its own part of R, and the same numbers on any mesh.
    The bias of a convolution starts at 0 where it is not inherited. Other leaves are always inherited.

    Args:
      key: determines R: of a kernel by its place among the sorted paths.
      params: at the end of the generation before.
      masks: `build_masks(...)`, the same for all generations.
      init_fn: (key, shape, dtype) -> R.

    Raises:
      UserError: if `masks` do not have the structure and shapes of `params`.
    """
    _check_congruent(params, masks)

    def born(index: int, role: str, path: str, leaf: Array, mask: Array) -> Array:
        if role == "kept":
            return leaf
        fresh = init_fn(jax.random.fold_in(key, index), leaf.shape, leaf.dtype) if role == "kernel" else 0
        return jnp.where(mask, leaf, fresh)

    return map_leaves(born, roles_of(params), params, masks)


def hypothesis_magnitude(params: Any, masks: Any) -> dict[str, Magnitudes]:
    """The mean absolute weights of both hypotheses, of each kernel by its path; NaN for one that has no weights.

    Over the generations the reset weights become small beside the others: the network collapses onto the fit part.

    Args:
      params: of one generation.
      masks: `build_masks(...)`.

    Raises:
      UserError: if `masks` do not have the structure and shapes of `params`.
    """
    _check_congruent(params, masks)
    each = zip(jax.tree.leaves_with_path(params), map(jnp.asarray, jax.tree.leaves(masks)), strict=True)
    return {
        path_name(path): Magnitudes(_mean_size(leaf, fit), _mean_size(leaf, ~fit))
        for (path, leaf), fit in each
        if is_kernel(path_name(path), leaf)
    }


def knowledge_evolution(
    train_fn: TrainFn,
    variables0: Mapping[str, Any],
    masks: Any,
    key: Key[Array, ""],
    num_generations: int,
    *,
    init_fn: Init = reset_init,
) -> list[dict[str, Any]]:
    """Trains a network for some generations: each but the first starts as `next_generation` of the one before.

    A generation is a whole training with a new optimizer and a new schedule of rates; it inherits the weights of the
    last step, and the model state (running statistics) as it is.

    Args:
      train_fn: (params, model_state, key) -> (params, model_state); may donate what it is given, and should be compiled
        before, since it is called once a generation.
      variables0: {"params": ..., and the other collections} at the start of the first generation.
      masks: `build_masks(...)`.
      key: generation g uses `fold_in(key, g)`.
      num_generations: at least 1.
      init_fn: (key, shape, dtype) -> values of what is drawn anew.

    Returns:
      The variables at the end of each generation, the first one first.

    Raises:
      UserError: if `num_generations` is below 1, or `masks` do not have the structure and shapes of the parameters.
    """
    if num_generations < 1:
        raise UserError(f"num_generations must be at least 1, got {num_generations}.")
    _check_congruent(variables0["params"], masks)
    start = _starter(variables0, init_fn)
    current = jax.tree.map(jnp.copy, dict(variables0))
    history: list[dict[str, Any]] = []
    for g in range(num_generations):
        init_key, train_key = jax.random.split(jax.random.fold_in(key, g))
        born = start(init_key, current, masks) if g else current
        params, state = train_fn(born.pop("params"), born, train_key)
        current = {"params": params, **state}
        history.append(current)
    return history


# --- helpers ---


def _starter(variables0: Mapping[str, Any], init_fn: Init) -> Callable[..., dict[str, Any]]:
    """A jitted (key, variables, masks) -> variables of the next generation.

    They have buffers of their own, so that training may donate them, and are sharded like `variables0`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding if getattr(leaf, "committed", False) else None, variables0)

    def start(key: Key[Array, ""], variables: dict[str, Any], masks: Any) -> dict[str, Any]:
        params = next_generation(key, variables["params"], masks, init_fn)
        return jax.tree.map(jnp.copy, {**variables, "params": params})

    return jax.jit(start, out_shardings=dict(shardings))


def _mean_size(leaf: Array, chosen: Array) -> Array:
    sizes = jnp.where(chosen, jnp.abs(leaf), 0).astype(jnp.float32)
    count = chosen.sum(dtype=jnp.float32)
    return jnp.where(count > 0, sizes.sum() / jnp.maximum(count, 1), jnp.nan)


def _check_congruent(params: Any, masks: Any) -> None:
    shapes, masked = (
        {path_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (params, masks)
    )
    if shapes.keys() != masked.keys():
        raise UserError("masks must have the structure of params: build_masks makes them.")
    for path, shape in shapes.items():
        if masked[path] != shape:
            raise UserError(f"The mask of {path} is {masked[path]}, and the leaf {shape}.")


def _fan_in(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])
