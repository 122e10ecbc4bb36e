"""The losses by which a generator is adapted to a few images, for `gan.GanStep`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.gan_games import Game, game_metrics
from jkd import gan, train
from jkd.gan.training import GanState


class PatchHead(nn.Module):
    """Logits of the patches that the positions of a map see: one 3x3 convolution."""

    @nn.compact
    def __call__(self, maps: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to logits [batch, height, width], float32."""
        return nn.Conv(1, (3, 3), dtype=jnp.float32, name="head")(maps.astype(jnp.float32))[..., 0]


@dataclasses.dataclass(frozen=True, eq=False)
class Adaptation:
    """The losses of one arm, as `gan.GanStep` takes them.

    Consts hold "source", the frozen generator's variables, "anchors", latents whose images are judged as wholes,
    "shots", images of the target in [-1, 1], and "fisher" where it is needed.

    Attributes:
      players: the networks.
      rules: the config's `game`.
      adapt: the config's `adapt`.
      arm: its section.
    """

    players: gan.Players
    rules: Any
    adapt: Any
    arm: Any

    def logits(self, params: Any, state: GanState, images: jax.Array, key: jax.Array) -> Any:
        """Whole-image logits, patch logits (or None) and features of images, augmented where the arm does so."""
        if self.arm.ada:
            share = state.running["augmentation"]
            images = gan.augment_with_probability(key, images, share, flip=False, rotate=False)
        judged, _ = self.players.judge({"params": params["whole"], **state.discriminator.model_state}, images)
        patch = None
        if self.adapt.patch_layer:
            patch = PatchHead().apply({"params": params["patch"]}, judged.features[self.adapt.patch_layer])
        return judged.logits, patch, judged.features

    def latents(self, key: jax.Array, consts: Any, count: int, t: Any) -> tuple[jax.Array, Any]:
        """Latents of a step, and whether its images are judged as wholes: in every k-th step, near the anchors."""
        anchor_key, free_key = jax.random.split(key)
        free = self.players.latents(free_key, count)
        if not (self.adapt.patch_layer and self.adapt.anchor_every):
            return free, jnp.asarray(True)
        near = gan.anchored_latents(anchor_key, consts["anchors"], count, sigma=self.adapt.anchor_sigma)
        whole = t % self.adapt.anchor_every == 0
        return jnp.where(whole, near, free), whole

    def judged(self, whole: Any, loss: Any, logits: tuple, *others: tuple) -> jax.Array:
        """A loss of whole-image logits in steps of anchors, of patches in the others."""
        pairs = (logits, *others)
        full = loss(*(x[0] for x in pairs))
        return full if logits[1] is None else jnp.where(whole, full, loss(*(x[1] for x in pairs)))

    def d_loss(self, params: Any, state: GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The discriminator's loss, and the contrast with the shots in its features."""
        latent_key, noise_key, real_key, fake_key, layer_key = jax.random.split(key, 5)
        images = batch["image"]
        latents, whole = self.latents(latent_key, consts, len(images), t)
        fake = self.generate(state.generator.variables, latents, noise_key).images
        real_out, fake_out = self.logits(params, state, images, real_key), self.logits(params, state, fake, fake_key)
        value = self.judged(whole, gan.nonsaturating_logistic_d_loss, real_out, fake_out)
        found = game_metrics(real_out[0], fake_out[0])
        if self.arm.cl2:
            source = self.generate(consts["source"], latents, noise_key).images
            contrast = self.contrast_with_shots(params, state, fake, source, consts["shots"], layer_key)
            value, found = value + self.arm.cl2 * contrast, {**found, "cl2": contrast}
        return value, train.Aux(found)

    def contrast_with_shots(
        self, params: Any, state: GanState, fake: jax.Array, source: jax.Array, shots: jax.Array, key: jax.Array
    ) -> jax.Array:
        """`gan.discriminator_contrastive_loss` in one layer of the discriminator, drawn at random."""
        variables = {"params": params["whole"], **state.discriminator.model_state}
        features = [self.players.judge(variables, x)[0].features for x in (fake, source, shots)]

        def loss(name: str) -> jax.Array:
            return gan.discriminator_contrastive_loss(*(of[name] for of in features), tau=self.adapt.tau)

        return gan.select_layer(key, [functools.partial(loss, name) for name in features[0]])

    def g_loss(self, params: Any, state: GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The generator's loss, and what ties its features and parameters to the source's."""
        latent_key, noise_key, view_key, layer_key = jax.random.split(key, 4)
        latents, whole = self.latents(latent_key, consts, len(batch["image"]), t)
        made = self.generate({"params": params, **state.generator.model_state}, latents, noise_key)
        out = self.logits(state.discriminator.params, state, made.images, view_key)
        value, found = self.judged(whole, gan.nonsaturating_logistic_g_loss, out), {}
        for name, loss in (("cl1", self.contrast), ("cdc", self.consistency)):
            if self.arm[name]:
                source = self.generate(consts["source"], latents, noise_key).features
                found[name] = loss(made.features, source, layer_key)
                value = value + self.arm[name] * found[name]
        if self.arm.ewc:
            found["ewc"] = gan.ewc_penalty(params, consts["source"]["params"], consts["fisher"])
            value = value + self.arm.ewc * found["ewc"]
        return value, train.Aux(found)

    def contrast(self, target: Mapping, source: Mapping, key: jax.Array) -> jax.Array:
        """`gan.generator_contrastive_loss` in one layer of the generator, drawn at random."""
        loss = functools.partial(gan.generator_contrastive_loss, tau=self.adapt.tau)
        return gan.select_layer(key, [functools.partial(loss, target[name], source[name]) for name in target])

    def consistency(self, target: Mapping, source: Mapping, key: jax.Array) -> jax.Array:
        """`gan.distance_consistency_loss` in one layer of the generator, drawn at random, as a mean over pairs."""
        losses = [functools.partial(gan.distance_consistency_loss, target[name], source[name]) for name in target]
        pairs = len(next(iter(target.values()))) - 1
        return gan.select_layer(key, losses) / pairs

    def generate(self, variables: Any, latents: jax.Array, key: jax.Array) -> gan.Generated:
        """Images and features as in training; equal keys draw equal noise for both generators."""
        return self.players.generate(variables, latents, key=key, train=False)[0]

    def d_penalty(self, params: Any, state: GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """R1 on whole-image logits, with its weight; the augmentation's probability moves with it."""
        variables, images = {"params": params["whole"], **state.discriminator.model_state}, batch["image"]
        value = gan.r1_penalty(lambda images: self.players.judge(variables, images)[0].logits, images)
        if not self.arm.ada:
            return gan.Penalty(self.rules.penalty_weight * value)
        seen = self.rules.penalty_every * len(images)
        moved = gan.ada_update(
            state.running["augmentation"],
            self.logits(params, state, images, key)[0],
            images=seen,
            adjust_images=self.adapt.ada_images,
        )
        return gan.Penalty(self.rules.penalty_weight * value, {"augmentation": moved})

    def g_penalty(self, params: Any, state: GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The path length penalty, with its weight."""
        return Game(self.players, self.rules).g_penalty(params, state, consts, batch, key, t)
