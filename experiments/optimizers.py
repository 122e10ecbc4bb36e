"""Optimizers and learning rate schedules by the fields of a config's section."""

from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jkd.errors import UserError, unknown

SCHEDULES = ("cosine", "cosine_epochs", "steps")
OPTIMIZERS = ("sgd", "adam")


def check_optimizer(section: ConfigDict, name: str, milestones: str, epochs: tuple) -> None:
    """Raises UserError unless a section's optimizer and schedule exist, and milestones (the field's name) are > 0."""
    if section.optimizer not in OPTIMIZERS:
        raise unknown(f"{name}.optimizer", section.optimizer, OPTIMIZERS)
    if section.schedule not in SCHEDULES:
        raise unknown(f"{name}.schedule", section.schedule, SCHEDULES)
    if section.schedule == "steps" and not all(epoch > 0 for epoch in epochs):
        raise UserError(f"{milestones} must be epochs > 0 where {name}.schedule is 'steps', got {tuple(epochs)}.")


def make_optimizer(section: ConfigDict, lr: float, num_steps: int, steps_per_epoch: float) -> Any:
    """SGD with coupled weight decay (added before momentum) or Adam with decoupled one, under a schedule.

        "cosine"          (1 + cos(pi t / num_steps)) / 2
        "cosine_epochs"   the same by whole epochs e after the warm-up of W: (1 + cos(pi (e - W) / (E - W))) / 2
        "steps"           tenfold drops after each of the `milestones`, in epochs

    In the first `warmup_epochs` the rate is scaled by (t + 1) / (their steps), or by (e + 1) / W.

    Raises:
      UserError: for an unknown optimizer or schedule; `check_optimizer` says so with the name of the section.
    """
    decay = optax.add_decayed_weights(section.weight_decay)
    if section.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", section.optimizer, OPTIMIZERS)
    direction = (
        (optax.scale_by_adam(), decay) if section.optimizer == "adam" else (decay, optax.trace(section.momentum))
    )
    rate = schedule(section, num_steps, steps_per_epoch)
    return optax.chain(
        *direction,
        optax.scale_by_schedule(lambda t: -rate(t)),
        # The rate is part of the state: one compiled step serves all that are tried.
        optax.inject_hyperparams(optax.scale)(step_size=lr),
    )


def schedule(section: ConfigDict, num_steps: int, steps_per_epoch: float) -> Any:
    """The factor of the learning rate at step t, as `make_optimizer` says."""
    rising = round(section.warmup_epochs * steps_per_epoch)
    if section.schedule == "cosine_epochs":
        return by_epochs(section.warmup_epochs, round(num_steps / steps_per_epoch), steps_per_epoch)
    if section.schedule == "cosine":
        shape = optax.cosine_decay_schedule(1.0, num_steps)
    elif section.schedule == "steps":
        drops = {round(epoch * steps_per_epoch): 0.1 for epoch in section.milestones}
        shape = optax.piecewise_constant_schedule(1.0, drops)
    else:
        raise unknown("schedule", section.schedule, SCHEDULES)
    return lambda t: shape(t) * (jnp.minimum((t + 1) / rising, 1.0) if rising else 1.0)


def by_epochs(warmup: float, epochs: float, steps_per_epoch: float) -> Any:
    """The schedule "cosine_epochs": one rate for all steps of an epoch."""

    def rate(t: Any) -> Any:
        epoch = jnp.floor((t + 0.5) / steps_per_epoch)  # a half: never on the border of two epochs
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - warmup) / max(epochs - warmup, 1)))
        return jnp.where(epoch < warmup, (epoch + 1) / max(warmup, 1.0), falling)

    return rate
