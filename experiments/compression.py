"""Networks whose weights are masked, or levels and choices: how they are applied, trained and measured."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments.optimizers import make_optimizer
from jkd import prune, quantize, train
from jkd.trees import path_name

MASKS = "masks"  # the collection of variables that holds them


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A network whose variables may hold levels and choices instead of kernels, and masks of weights.

    Attributes:
      apply_fn: of the network, on plain variables.
      materialize: parameters -> kernels.
    """

    apply_fn: Callable
    materialize: Callable[[Any], Any]

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The network's own `apply` on the kernels."""
        return self.apply_fn(self.plain(variables), *args, **kwargs)

    def plain(self, variables: Any) -> Any:
        """The network's own variables: kernels, in which what is masked out is 0, and no masks."""
        rest = {name: tree for name, tree in variables.items() if name not in ("params", MASKS)}
        flags = jax.tree.map(lambda flag: flag.astype(bool), variables.get(MASKS))  # packed ones come as numbers
        mask = (prune.apply(flags),) if MASKS in variables else ()
        return {"params": train.chain(self.materialize, *mask)(variables["params"]), **rest}


def pack(variables: Any) -> Any:
    """Low-bit kernels as packed codes, and masks as a bit a weight; see `quantize.pack_params`."""
    packed = quantize.pack_params(variables)
    if MASKS in packed:
        packed[MASKS] = jax.tree.map(lambda mask: quantize.pack_mask(mask) if mask.ndim else mask, packed[MASKS])
    return packed


def make_groups(
    section: ConfigDict, arm: ConfigDict, num_steps: int, per_epoch: float
) -> Callable[[Any], optax.GradientTransformation]:
    """The optimizer of quantized parameters: choices and levels by Adam at rates of their own and without decay.

    Levels that are not learned, and bases that follow their weights, stay as they are. The result takes a tree of
    parameters, or its shapes.
    """
    adam = section.copy_and_resolve_references()
    adam.optimizer, adam.weight_decay = "adam", 0.0
    groups = {
        "choices": make_optimizer(adam, arm.choice_scale * arm.lr, num_steps, per_epoch),
        "levels": make_optimizer(adam, arm.level_scale * arm.lr, num_steps, per_epoch),
        "weights": make_optimizer(section, arm.lr, num_steps, per_epoch),
        "frozen": optax.set_to_zero(),
    }

    labels = functools.partial(quantize.labels, learn_levels=arm.get("learn_levels", True))
    return optax.partition(groups, labels)


def following(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which also moves the bases of LQ-Nets to where `quantize.refresh_bases` has them, each step."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = optax.with_extra_args_support(optimizer).update(updates, state, params, **extra)
        moved = jax.tree.map(jnp.subtract, quantize.refresh_bases(params), params)
        add = jax.tree_util.tree_map_with_path(
            lambda path, update, move: move if path_name(path).endswith("/basis") else update, updates, moved
        )
        return add, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
