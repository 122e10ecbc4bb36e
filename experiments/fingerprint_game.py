"""A generator that writes fingerprints into images, and a decoder that reads them: what they are trained by."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import gan_networks
from experiments.classification import dtypes
from experiments.gan_games import Game
from jkd import data, gan, train
from jkd.errors import UserError, unknown

SUB = "generator"  # beside "decoder" in the parameters of what the generator's loss trains


def parse_perturbation(spec: str, field: str) -> tuple[str, float]:
    """`"noise:0.1"` as `("noise", 0.1)`.

    Raises:
      UserError: for anything else, naming the config's `field`.
    """
    name, _, strength = spec.partition(":")
    if name not in data.PERTURBATIONS:
        raise unknown(f"perturbation in {field}", name, tuple(data.PERTURBATIONS))
    try:
        return name, int(strength) if strength.isdigit() else float(strength)
    except ValueError as error:
        raise UserError(f'{field} holds perturbations as "NAME:STRENGTH", got {spec!r}.') from error


def perturbed(key: jax.Array, images: jax.Array, name: str, strength: float) -> jax.Array:
    """Images in [-1, 1] after one perturbation, in [-1, 1]."""
    return 2 * data.perturb(key, (jnp.clip(images, -1, 1) + 1) / 2, name, strength) - 1


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What reads a latent and bits from images.

    Attributes:
      model: an encoder with `latent_dim` + bits outputs.
      latent_dim: of the latent.
    """

    model: Any
    latent_dim: int

    def read(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latent and the logits of bits."""
        out = self.model.apply({"params": params}, images)
        return out[:, : self.latent_dim], out[:, self.latent_dim :]


def build_decoder(config: ConfigDict, shape: tuple[int, int, int], bits: int) -> Decoder:
    """The decoder of a config, for so many bits."""
    section, outputs = config.decoder, config.generator.latent_dim + bits
    named = dtypes(config.precision)
    if section.model == "mlp":
        return Decoder(gan.MLPEncoder(outputs, tuple(section.hidden), **named), config.generator.latent_dim)
    model = gan.StyleGAN2Encoder(
        outputs=outputs,
        resolution=gan_networks.resolution_of(shape),
        channels=shape[-1],
        fmap_base=section.fmap_base,
        fmap_max=section.fmap_max,
        **named,
    )
    return Decoder(model, config.generator.latent_dim)


@dataclasses.dataclass(frozen=True, eq=False)
class FingerprintGame(Game):
    """The game of a generator that writes fingerprints and a decoder that reads them, against a discriminator.

    Attributes:
      decoder: what reads them.
      bits: of a fingerprint.
      weights: of the four terms of `gan.fingerprint_losses`.
      immunize: perturbations, one of which is drawn for the images that the decoder sees; (): none.
    """

    decoder: Decoder | None = None
    bits: int = 0
    weights: tuple[float, ...] = (1.0, 1.0, 2.0, 2.0)
    immunize: tuple[tuple[str, float], ...] = ()

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Variables of generator and decoder together, and of the discriminator."""
        assert self.decoder is not None
        key, decoder_key = jax.random.split(key)
        generator, discriminator = self.players.init(key)
        decoder = self.decoder.model.init(decoder_key, jnp.zeros((1, *self.players.shape)))
        return {"params": {SUB: generator["params"], "decoder": decoder["params"]}}, discriminator

    def g_loss(self, params: Any, state: gan.GanState, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        """The four terms, on images of equal latents with two fingerprints each."""
        assert self.decoder is not None
        count = len(batch["image"])
        latent_key, bit_key, other_key, noise_key, view_key = jax.random.split(key, 5)
        variables, latents = self.generator(params, state.generator), self.players.latents(latent_key, count)
        bits = gan.sample_fingerprints(bit_key, count, self.bits)
        other = gan.sample_fingerprints(other_key, count, self.bits)
        images, twins = (
            self.players.generate(variables, latents, c, key=noise_key, train=True)[0].images for c in (bits, other)
        )
        judged, _ = self.players.judge(state.discriminator.variables, images, train=True)
        read, logits = self.decoder.read(params["decoder"], self.seen(view_key, images))
        terms = gan.fingerprint_losses(
            latents, read, bits, logits, images, twins, judged.logits, weights=self.weights
        )._asdict()
        total = terms.pop("total")
        return total, train.Aux({**terms, "bit_accuracy": share_right(logits, bits)})

    def seen(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """The images as the decoder sees them while it learns."""
        if not self.immunize:
            return images
        pick, key = jax.random.split(key)
        ways: list[Any] = [functools.partial(perturbed, key, name=n, strength=s) for n, s in self.immunize]
        ways.append(lambda images: images)
        return jax.lax.switch(jax.random.randint(pick, (), 0, len(ways)), ways, images)


def share_right(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """The share of bits that are read right."""
    return ((logits > 0) == (bits > 0.5)).mean()
