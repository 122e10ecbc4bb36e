"""A generator and a discriminator in training: their state, and the step that updates both."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jkd.checks import check_share
from jkd.errors import UserError
from jkd.nn.canonical import canonical_convolutions
from jkd.train.gradient import Aux, value_and_grad
from jkd.train.state import TrainState, create_state

RUNNING = ("path_length", "augmentation")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GanState:
    """What changes while a generator and a discriminator train.

    Attributes:
      generator: of all that the generator's loss trains (an encoder may be among its parameters).
      discriminator: likewise.
      average: the moving average of the generator's parameters, float32 at least.
      running: numbers that penalties carry from step to step, f32[] each: "path_length", the mean of
        `path_length_penalty`, and "augmentation", the probability of `ada_update`.
    """

    generator: TrainState
    discriminator: TrainState
    average: Any
    running: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        """A plain tree: what the averaged generator, the generator itself and the discriminator are applied to."""
        averaged = {"params": self.average, **self.generator.model_state}
        return {
            "average": averaged,
            "generator": self.generator.variables,
            "discriminator": self.discriminator.variables,
        }


class Penalty(NamedTuple):
    """What a regularizer returns: its value, and those of the state's `running` numbers that it changes."""

    value: jax.Array
    running: dict[str, Any] = {}  # noqa: RUF012  (never changed)


def create_gan_state(
    generator: Any,
    discriminator: Any,
    g_optimizer: optax.GradientTransformation,
    d_optimizer: optax.GradientTransformation,
) -> GanState:
    """The state at step 0 from the variables of both networks; the average begins at the generator's parameters."""
    g, d = create_state(generator, g_optimizer), create_state(discriminator, d_optimizer)
    # A copy: one buffer cannot be given away twice by a step that donates its state.
    average = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), g.params)
    return GanState(g, d, average, {name: jnp.zeros((), jnp.float32) for name in RUNNING})


def lazy_adam(
    learning_rate: float, every: int = 1, *, b1: float = 0.0, b2: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam for a network whose penalty has an update of its own in every k-th step.

    There are k + 1 updates in k steps. With c = k / (k + 1), rate and betas become c * rate and beta^c, so that the
    network moves, and forgets, as much a step as without; k = 1 is plain Adam (the penalty is part of the loss).

    Raises:
      UserError: if `every` is below 1.

    Reference: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, appendix B.
    """
    if every < 1:
        raise UserError(f"every must be at least 1, got {every}.")
    c = every / (every + 1) if every > 1 else 1.0
    return optax.chain(
        optax.scale_by_adam(b1**c, b2**c, eps),
        optax.scale(-c),
        # The rate is part of the state: one compiled step serves all that are tried.
        optax.inject_hyperparams(optax.scale)(step_size=learning_rate),
    )


def average_decay(batch_size: int, half_life: float) -> float:
    """The decay of the generator's average that halves what it holds after so many images: 0.5^(batch / half_life)."""
    return 0.5 ** (batch_size / half_life)


@dataclasses.dataclass(frozen=True)
class GanStep:
    """`Stage.step` of two networks: an update of the discriminator, then one of the generator, then of its average.

    Every function takes `(params, state, consts, batch, key, t)`, where `params` are those of the network that is
    updated and `state` is a `GanState`: what the other network is applied to is `state.generator.variables` or
    `state.discriminator.variables`. The generator's functions see the updated discriminator. Nothing is per device:
    losses see the global batch.

    A penalty with `every` 1 is added to its loss. With a larger one it is computed in the steps t = 0, every,
    2 every, .. alone, multiplied by `every`, in an update of its own (lazy regularization; see `lazy_adam`); it is a
    branch of the program, and t is the loop's, so that a resumed run goes on in the same phase.

    Attributes:
      d_loss: returns a scalar, or `(scalar, Aux)`.
      g_loss: likewise.
      d_optimizer: of the discriminator.
      g_optimizer: of the generator.
      d_penalty: returns a `Penalty`; None: none.
      g_penalty: likewise.
      d_every: steps between the discriminator's penalties.
      g_every: steps between the generator's.
      decay: of the average, in [0, 1).
      view: `view(key, consts, batch) -> batch`, without gradient: images as both networks see them.
      saved: see `train.value_and_grad`.
    """

    d_loss: Callable
    g_loss: Callable
    d_optimizer: optax.GradientTransformation
    g_optimizer: optax.GradientTransformation
    d_penalty: Callable | None = None
    g_penalty: Callable | None = None
    d_every: int = 1
    g_every: int = 1
    decay: float = 0.999
    view: Callable | None = None
    saved: tuple[str, ...] | None = None

    def __post_init__(self):
        check_share("decay", self.decay)
        if min(self.d_every, self.g_every) < 1:
            raise UserError(f"d_every and g_every must be at least 1, got {self.d_every} and {self.g_every}.")

    def __call__(
        self, key: jax.Array, state: GanState, consts: Any, batch: Any, t: Any
    ) -> tuple[GanState, dict[str, jax.Array]]:
        """One step on a state of `create_gan_state`; the metrics of both losses begin with d_ and g_."""
        view_key, d_key, g_key = jax.random.split(key, 3)
        batch = batch if self.view is None else self.view(view_key, consts, batch)
        state, d_metrics = self._play("discriminator", state, consts, batch, d_key, t)
        state, g_metrics = self._play("generator", state, consts, batch, g_key, t)
        average = optax.incremental_update(state.generator.params, state.average, 1 - self.decay)
        return dataclasses.replace(state, average=average), {**d_metrics, **g_metrics}

    def _play(self, who: str, state: GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """One network's update by its loss, and by its penalty where that is due."""
        short = who[0]
        loss, optimizer, penalty, every = (
            getattr(self, f"{short}_{name}") for name in ("loss", "optimizer", "penalty", "every")
        )
        loss_key, penalty_key = jax.random.split(key)

        def objective(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            out = loss(params, state, consts, batch, loss_key, t)
            value, aux = out if isinstance(out, tuple) else (out, Aux({}))
            if penalty is None or every > 1:
                return value, Aux({"loss": value, **aux.metrics}, (aux.model_state, {}))
            extra = penalty(params, state, consts, batch, penalty_key, t)
            metrics = {"loss": value, "penalty": extra.value, **aux.metrics}
            return value + extra.value, Aux(metrics, (aux.model_state, extra.running))

        gradient = value_and_grad(objective, saved=self.saved)
        (_, aux), grads = gradient(getattr(state, who).params, batch, loss_key)
        model_state, running = aux.model_state
        state = _updated(state, who, optimizer, grads, model_state, running)
        metrics = {f"{short}_{name}": value for name, value in aux.metrics.items()}
        if penalty is not None and every > 1:
            state, value = self._lazily(who, penalty, every, optimizer, state, consts, batch, penalty_key, t)
            metrics[f"{short}_penalty"] = value
        return state, {**metrics, f"{short}_grad_norm": optax.tree.norm(grads)}

    def _lazily(
        self,
        who: str,
        penalty: Callable,
        every: int,
        optimizer: optax.GradientTransformation,
        state: GanState,
        consts: Any,
        batch: Any,
        key: jax.Array,
        t: Any,
    ) -> tuple[GanState, jax.Array]:
        """The penalty's own update in every k-th step; the value is k times the penalty there, and 0 elsewhere."""

        def due(state: GanState) -> tuple[GanState, jax.Array]:
            def objective(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
                extra = penalty(params, state, consts, batch, key, t)
                return every * extra.value, Aux({}, extra.running)

            (value, aux), grads = value_and_grad(objective)(getattr(state, who).params, batch, key)
            return _updated(state, who, optimizer, grads, None, aux.model_state), value.astype(jnp.float32)

        def not_due(state: GanState) -> tuple[GanState, jax.Array]:
            return state, jnp.zeros((), jnp.float32)

        # A branch's convolutions stay as they are: derivatives would be in layouts that are slow on a CPU.
        return jax.lax.cond(t % every == 0, canonical_convolutions(due), not_due, state)


def _updated(
    state: GanState, who: str, optimizer: optax.GradientTransformation, grads: Any, model_state: Any, running: Any
) -> GanState:
    old: TrainState = getattr(state, who)
    updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
    params = optax.apply_updates(old.params, updates)
    new = TrainState(params, opt_state, old.model_state if model_state is None else model_state)
    moved = {name: jax.lax.stop_gradient(value).astype(jnp.float32) for name, value in running.items()}
    return dataclasses.replace(state, **{who: new}, running={**state.running, **moved})
