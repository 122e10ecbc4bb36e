"""A generator and a discriminator as pure functions of their variables."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jkd.gan.outputs import Generated, Judged
from jkd.gan.styles import mix_styles
from jkd.nn import apply_train, split


@dataclasses.dataclass(frozen=True)
class Players:
    """The two networks of a game, with one way to call them whatever they are made of.

    Attributes:
      generator: `apply(variables, latents, condition, train=...) -> Generated`.
      discriminator: `apply(variables, images, references, condition, train=...) -> Judged`.
      shape: of an image.
      latent_dim: of a latent.
      condition_dim: numbers in a condition; 0: none.
      style_mixing: the share of images whose styles come from two latents (needs a generator with a style a layer).
    """

    generator: nn.Module
    discriminator: nn.Module
    shape: tuple[int, int, int]
    latent_dim: int
    condition_dim: int = 0
    style_mixing: float = 0.0

    def init(self, key: Key[Array, ""]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Variables of the generator and of the discriminator."""
        g_key, d_key = jax.random.split(key)
        images, latents = jnp.zeros((1, *self.shape)), jnp.zeros((1, self.latent_dim))
        condition = jnp.zeros((1, self.condition_dim)) if self.condition_dim else None
        generator = self.generator.init(g_key, latents, condition)
        references = images if self.takes_references else None
        judged = condition if self.judges_conditions else None
        return dict(generator), dict(self.discriminator.init(d_key, images, references, judged))

    @property
    def takes_references(self) -> bool:
        """Whether the discriminator compares every image with a real one."""
        return any(kind == "reference" for _, kind in getattr(self.discriminator, "attention", ()))

    @property
    def judges_conditions(self) -> bool:
        """Whether the discriminator looks at the condition of an image too."""
        return bool(getattr(self.discriminator, "condition_dim", 0))

    def latents(self, key: Key[Array, ""], count: int) -> Float[Array, "count dim"]:
        """Standard normal latents."""
        return jax.random.normal(key, (count, self.latent_dim))

    def generate(
        self,
        variables: Any,
        latents: Float[Array, "batch dim"],
        condition: Float[Array, "batch numbers"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> tuple[Generated, dict[str, Any]]:
        """Images, and the generator's new other variables (the old ones where `train` is False).

        Args:
          variables: of the generator.
          latents: one an image.
          condition: one an image where the generator takes one.
          key: for noise within the generator, and for second latents where styles are mixed.
          train: whether statistics are those of the batch.
        """
        if key is not None and self.style_mixing and train:
            return self._mixed(variables, latents, condition, key)
        rngs = {} if key is None else {"noise": key}

        def apply(variables: Any, latents: Any, **options: Any) -> Any:
            return self.generator.apply(variables, latents, condition, **options)

        params, state = split(variables)
        if train:
            return apply_train(apply, params, state, latents, rngs or None)
        return apply(variables, latents, train=False, **({"rngs": rngs} if rngs else {})), state

    def _mixed(self, variables: Any, latents: Any, condition: Any, key: Array) -> tuple[Generated, dict[str, Any]]:
        second_key, mix_key, noise_key = jax.random.split(key, 3)
        pair = (latents, self.latents(second_key, len(latents)))
        own, other = (self.styles(variables, z, condition) for z in pair)
        mixed = mix_styles(mix_key, own, other, self.style_mixing)
        return self.synthesize(variables, mixed, latents, key=noise_key), split(variables)[1]

    def styles(self, variables: Any, latents: Array, condition: Array | None = None) -> Array:
        """What the generator's `mapping` makes, which path lengths are measured in."""
        return self.generator.apply(variables, latents, condition, method="mapping")  # type: ignore[return-value]

    def synthesize(self, variables: Any, styles: Array, latents: Array, *, key: Array | None = None) -> Generated:
        """The images of what the generator's `mapping` gives; latents count where styles come from a condition."""
        rngs: dict[str, Any] = {} if key is None else {"rngs": {"noise": key}}
        return self.generator.apply(variables, styles, latents, method="synthesize", **rngs)  # type: ignore[return-value]

    def judge(
        self,
        variables: Any,
        images: Float[Array, "batch height width channels"],
        references: Float[Array, "batch height width channels"] | None = None,
        condition: Float[Array, "batch numbers"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Judged, dict[str, Any]]:
        """Logits, and the discriminator's new other variables (the old ones where `train` is False).

        References and conditions that it has no use for are left out.
        """
        references = references if self.takes_references else None
        condition = condition if self.judges_conditions else None

        def apply(variables: Any, images: Any, **options: Any) -> Any:
            return self.discriminator.apply(variables, images, references, condition, **options)

        params, state = split(variables)
        if train:
            return apply_train(apply, params, state, images)
        return apply(variables, images, train=False), state


def references_of(images: Float[Array, " batch *image"]) -> Float[Array, " batch *image"]:
    """Another image of the batch for each: half a batch further on.

    In a shuffled batch that is an independent draw that is never the image itself (of two or more).
    """
    return jnp.roll(images, len(images) // 2, axis=0)


def as_uint8(images: Float[Array, "*shape"]) -> Array:
    """Images in [-1, 1], clipped and rounded to what is released: uint8."""
    return jnp.round(jnp.clip(127.5 * (images + 1), 0, 255)).astype(jnp.uint8)


def from_uint8(images: Array) -> Float[Array, "*shape"]:
    """Images as networks see them: [-1, 1], float32."""
    return images.astype(jnp.float32) / 127.5 - 1
