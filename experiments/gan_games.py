"""What a generator and a discriminator are trained by: losses, penalties, optimizers, and the step made of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jkd import gan, train

BETWEEN = {"zero_centered": gan.zero_centered_gradient_penalty, "one_centered": gan.one_centered_gradient_penalty}
PENALTIES = ("r1", *BETWEEN, "none")
Loss = tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]
LOSSES: dict[str, Loss] = {
    "logistic": (gan.nonsaturating_logistic_d_loss, lambda r, f: gan.nonsaturating_logistic_g_loss(f)),
    "hinge": (gan.hinge_d_loss, lambda r, f: gan.hinge_g_loss(f)),
    "least_squares": (gan.least_squares_d_loss, lambda r, f: gan.least_squares_g_loss(f)),
    "wgan": (gan.wgan_d_loss, lambda r, f: gan.wgan_g_loss(f)),
    "relativistic": (gan.relativistic_logistic_d_loss, gan.relativistic_logistic_g_loss),
    "dual": (gan.dual_contrastive_d_loss, gan.dual_contrastive_g_loss),
    "dual_saturating": (
        gan.dual_contrastive_d_loss,
        functools.partial(gan.dual_contrastive_g_loss, saturating=True),
    ),
}
PAIRED = ("relativistic", "dual", "dual_saturating")  # whose generator's part looks at real logits


@dataclasses.dataclass(frozen=True, eq=False)
class Game:
    """The losses and penalties of one pair of networks, as `gan.GanStep` takes them.

    Attributes:
      players: the networks.
      rules: the config's `game`.
      loss: a name in `LOSSES`.
      condition: `condition(key, count) -> [count, numbers]`, drawn anew for every image; None: none.
      sub: the entry of the generator's parameters that holds it, where they hold more ("": they are its own).
    """

    players: gan.Players
    rules: Any
    loss: str = "logistic"
    condition: Callable[[jax.Array, int], jax.Array] | None = None
    sub: str = ""

    def generator(self, params: Any, state: train.TrainState) -> dict[str, Any]:
        """The generator's variables among the parameters of what trains with it."""
        return {"params": params[self.sub] if self.sub else params, **state.model_state}

    def fakes(self, params: Any, state: gan.GanState, key: jax.Array, count: int) -> tuple[Any, Any]:
        """Images as in training, and the generator's new other variables."""
        latent_key, condition_key, noise_key = jax.random.split(key, 3)
        condition = None if self.condition is None else self.condition(condition_key, count)
        variables, latents = self.generator(params, state.generator), self.players.latents(latent_key, count)
        return self.players.generate(variables, latents, condition, key=noise_key, train=True)

    def d_loss(self, params: Any, state: gan.GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The discriminator's loss on the batch and as many generated images, and its drift penalty."""
        images = batch["image"]
        fake, _ = self.fakes(state.generator.params, state, key, len(images))
        references, judge = gan.references_of(images), self.players.judge
        variables = {"params": params, **state.discriminator.model_state}
        real, kept = judge(variables, images, references, train=True)
        false, kept = judge({"params": params, **kept}, fake.images, references, train=True)
        value = LOSSES[self.loss][0](real.logits, false.logits) + self.rules.drift * gan.drift_penalty(real.logits)
        return value, train.Aux(game_metrics(real.logits, false.logits), kept)

    def g_loss(self, params: Any, state: gan.GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The generator's loss against the updated discriminator."""
        images, judge = batch["image"], self.players.judge
        fake, kept = self.fakes(params, state, key, len(images))
        references, variables = gan.references_of(images), state.discriminator.variables
        false, _ = judge(variables, fake.images, references, train=True)
        real = judge(variables, images, references, train=True)[0].logits if self.loss in PAIRED else None
        return LOSSES[self.loss][1](real, false.logits), train.Aux({}, kept)

    def d_penalty(self, params: Any, state: gan.GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The penalty on the discriminator's slope, with its weight."""
        images, rules = batch["image"], self.rules
        variables = {"params": params, **state.discriminator.model_state}
        references = gan.references_of(images)

        def logits(images: jax.Array) -> jax.Array:
            return self.players.judge(variables, images, references)[0].logits

        if rules.penalty == "r1":
            return gan.Penalty(rules.penalty_weight * gan.r1_penalty(logits, images))
        fake_key, between_key = jax.random.split(key)
        fake = jax.lax.stop_gradient(self.fakes(state.generator.params, state, fake_key, len(images))[0].images)
        value = BETWEEN[rules.penalty](logits, images, fake.astype(images.dtype), between_key)
        return gan.Penalty(rules.penalty_weight * value)

    def g_penalty(self, params: Any, state: gan.GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The path length penalty, with its weight, on a part of the batch."""
        players, rules = self.players, self.rules
        count = max(len(batch["image"]) // rules.path_shrink, 1)
        latent_key, condition_key, noise_key, key = jax.random.split(key, 4)
        variables, latents = self.generator(params, state.generator), players.latents(latent_key, count)
        condition = None if self.condition is None else self.condition(condition_key, count)
        styles = players.styles(variables, latents, condition)

        def images(styles: jax.Array) -> jax.Array:
            return players.synthesize(variables, styles, latents, key=noise_key).images

        found = gan.path_length_penalty(images, styles, key, state.running["path_length"], decay=rules.path_decay)
        return gan.Penalty(rules.path_weight * found.penalty, {"path_length": found.mean})


def game_metrics(real: jax.Array, fake: jax.Array) -> dict[str, jax.Array]:
    """The mean logits, and the share of pairs that the discriminator tells apart beyond doubt."""
    return {
        "real_logit": real.mean(),
        "fake_logit": fake.mean(),
        "separation": gan.logit_separation(real, fake),
    }


def optimizers(rules: ConfigDict, lr: float) -> dict[str, Any]:
    """Adam for both networks, whose rate and betas heed their lazy penalties."""
    betas = {"b1": rules.beta1, "b2": rules.beta2, "eps": rules.eps}
    penalized = rules.penalty != "none" and rules.penalty_weight
    return {
        "d_optimizer": gan.lazy_adam(lr, rules.penalty_every if penalized else 1, **betas),
        "g_optimizer": gan.lazy_adam(lr, rules.path_every if rules.path_weight else 1, **betas),
    }


def make_step(setup: Any, game: Any, lr: float, **changes: Any) -> gan.GanStep:
    """The step of a game at a learning rate; `changes` are fields of `gan.GanStep`."""
    rules = game.rules
    penalized = rules.penalty != "none" and rules.penalty_weight

    def view(key: jax.Array, consts: Any, batch: Any) -> Any:
        return {**batch, "image": setup.real(key, batch["image"])}

    batch_size = setup.config.batch_size
    fields: dict[str, Any] = {
        "d_loss": game.d_loss,
        "g_loss": game.g_loss,
        "d_penalty": game.d_penalty if penalized else None,
        "g_penalty": game.g_penalty if rules.path_weight else None,
        "d_every": rules.penalty_every,
        "g_every": rules.path_every,
        "decay": gan.average_decay(batch_size, rules.half_life) if rules.half_life else rules.decay,
        "view": view,
        **optimizers(rules, lr),
    }
    return gan.GanStep(**{**fields, **changes})
