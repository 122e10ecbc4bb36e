"""The training state of one model, its gradient step, and transforms of parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jkd.errors import UserError
from jkd.train.gradient import value_and_grad
from jkd.train.mesh import path_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What changes while one model trains.

    Attributes:
      params: the tree that gradients are taken for.
      opt_state: the optimizer's state.
      model_state: the model's other variables (`{"batch_stats": ...}`, or `{}`).
    """

    params: Any
    opt_state: Any
    model_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `apply_fn` takes, and what a stage of one model publishes: a plain tree of dicts."""
        return {"params": self.params, **self.model_state}


def create_state(variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Splits `variables` into parameters and the rest, and initializes the optimizer."""
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    return TrainState(variables["params"], optimizer.init(variables["params"]), model_state)


def plain_state(state: TrainState) -> dict[str, Any]:
    """The whole state as a plain tree, for `Stage.snapshot`: `restore_state` makes a state of it again.

    Returns:
      `{"params", "opt_state", "model_state"}`, where the optimizer's state is a dict of its leaves by path, such as
      `0/trace/dense/kernel`: sharding rules find the names of the parameters in them.
    """
    opt_state = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)}
    return {"params": state.params, "opt_state": opt_state, "model_state": state.model_state}


def restore_state(plain: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state that `plain_state` made a plain tree of, for the optimizer (or an equal one) that it was trained with.

    Raises:
      UserError: if the optimizer's state has other leaves, shapes or dtypes.
    """
    shapes = jax.eval_shape(optimizer.init, plain["params"])
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    stored = plain["opt_state"]
    wrong = [
        f"{name} ({_kind(stored.get(name))} stored, {_kind(leaves.get(name))} needed)"
        for name in sorted(stored.keys() | leaves.keys())
        if _kind(stored.get(name)) != _kind(leaves.get(name))
    ]
    if wrong:
        raise UserError(f"The stored state is of another optimizer. What differs: {', '.join(wrong)}.")
    opt_state = jax.tree.unflatten(jax.tree.structure(shapes), [stored[name] for name in leaves])
    return TrainState(plain["params"], opt_state, plain["model_state"])


def _kind(leaf: Any) -> str:
    return "none" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def make_train_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    saved: Sequence[str] | None = None,
) -> Callable:
    """Makes the pure step `step(state, batch, key) -> (state, metrics)` from a loss.

    Args:
      loss_fn: `loss_fn(params, batch, key)` returns a scalar, or `(scalar, Aux)`.
      optimizer: any optax transformation.
      microbatches: see `value_and_grad`.
      saved: see `value_and_grad`.

    The metrics are `loss`, `grad_norm` (the global l2 norm of the gradient) and those of the `Aux`.
    """
    gradient = value_and_grad(loss_fn, microbatches=microbatches, saved=saved)

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, aux), grads = gradient(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        model_state = state.model_state if aux.model_state is None else aux.model_state
        state = TrainState(optax.apply_updates(state.params, updates), opt_state, model_state)
        return state, {"loss": loss, "grad_norm": optax.tree.norm(grads), **aux.metrics}

    return step


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """`Stage.step` of one model with one loss, in a form that `remat` and `microbatch` can change.

    Attributes:
      loss_fn: `loss_fn(params, state, consts, batch, key, t)` returns a scalar, or `(scalar, Aux)`.
      optimizer: any optax transformation; or `optimizer(consts)` that makes one, where it depends on arrays such as
        masks. Stages that share a `ModelStep` and differ in their consts alone share its compiled program.
      view: `view(key, consts, batch) -> batch`, without gradient: what is drawn at random for the batch as a whole,
        such as augmented images. It gets the same key as the loss: split it where both draw.
      microbatches: see `value_and_grad`.
      saved: see `value_and_grad`.
    """

    loss_fn: Callable
    optimizer: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
    view: Callable | None = None
    microbatches: int = 1
    saved: tuple[str, ...] | None = None

    def __call__(
        self, key: jax.Array, state: TrainState, consts: Any, batch: Any, t: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on a state of `create_state`."""
        batch = batch if self.view is None else self.view(key, consts, batch)

        def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
            return self.loss_fn(params, state, consts, batch, key, t)

        optimizer = self.optimizer(consts) if callable(self.optimizer) else self.optimizer
        step = make_train_step(loss_fn, optimizer, microbatches=self.microbatches, saved=self.saved)
        return step(state, batch, key)


def chain(*transforms: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Composes transforms of parameters, applied from left to right; `chain()` is the identity."""

    def apply(params: Any) -> Any:
        for transform in transforms:
            params = transform(params)
        return params

    return apply
