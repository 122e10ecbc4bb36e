"""The training state of one model, its gradient step, and transforms of parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax


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


class Aux(NamedTuple):
    """What a loss may return beside its value: scalars to log, and the model's new other variables."""

    metrics: dict[str, Any]
    model_state: Any = None


def create_state(variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Splits `variables` into parameters and the rest, and initializes the optimizer."""
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    return TrainState(variables["params"], optimizer.init(variables["params"]), model_state)


def make_train_step(loss_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """Makes the pure step `step(state, batch, key) -> (state, metrics)` from a loss.

    Args:
      loss_fn: `loss_fn(params, batch, key)` returns a scalar, or `(scalar, Aux)`.
      optimizer: any optax transformation.

    The metrics are `loss`, `grad_norm` (the global l2 norm of the gradient) and those of the `Aux`.
    """

    def with_aux(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Aux]:
        out = loss_fn(params, batch, key)
        return out if isinstance(out, tuple) else (out, Aux({}))

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, aux), grads = jax.value_and_grad(with_aux, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        model_state = state.model_state if aux.model_state is None else aux.model_state
        state = TrainState(optax.apply_updates(state.params, updates), opt_state, model_state)
        return state, {"loss": loss, "grad_norm": optax.tree.norm(grads), **aux.metrics}

    return step


def chain(*transforms: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Composes transforms of parameters, applied from left to right; `chain()` is the identity."""

    def apply(params: Any) -> Any:
        for transform in transforms:
            params = transform(params)
        return params

    return apply
