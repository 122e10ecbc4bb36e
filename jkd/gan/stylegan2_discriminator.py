"""The discriminator of StyleGAN2, and an encoder with the same trunk."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
from jkd.gan.checks import check_condition
from jkd.gan.layers import ATTENTION, SELF_ATTENTION, EqualizedConv, EqualizedDense, group_deviation, self_attention
from jkd.gan.outputs import Judged
from jkd.gan.resampling import Maps, NewMaps, downsample
from jkd.gan.stylegan2 import Condition, check_resolution, count_channels
from jkd.nn.layers import at_least_float32


def project(
    outputs: Float[Array, "batch outputs"], condition: Float[Array, "batch condition_dim"] | None
) -> Float[Array, " batch"]:
    """Logits from a last layer with one output, and one more for each entry of the condition: o_0 + sum_c y_c o_c.

    Reference: Miyato and Koyama, cGANs with Projection Discriminator, ICLR 2018.
    """
    outputs = outputs.astype(at_least_float32(outputs.dtype))
    if condition is None:
        return outputs[:, 0]
    return outputs[:, 0] + (outputs[:, 1:] * condition).sum(1)


class Trunk(nn.Module):
    """From images to vectors; attributes as in `StyleGAN2Discriminator`, `minibatch_group=0` for no statistics."""

    resolution: int
    fmap_base: int
    fmap_max: int
    architecture: str
    attention: tuple[tuple[int, str], ...]
    minibatch_group: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, images: Maps, references: Maps | None
    ) -> tuple[Float[Array, "batch units"], dict[str, Float[Array, "batch ..."]]]:
        """Vectors, and the maps of each resolution."""
        batch, features = len(images), {}
        x: Any = None
        # An image and its reference are neighbors, so that both stay on one device.
        image = images if references is None else jnp.stack((images, references), 1).reshape(-1, *images.shape[1:])
        for level in range(self.resolution.bit_length() - 1, 1, -1):
            size = 2**level
            if x is None or self.architecture == "skip":
                colors = self._conv(self._width(size), 1, f"from_rgb{size}")(image)
                x = colors if x is None else x + colors
            for place, kind in self.attention:
                if place == size:
                    x, image = self._attend(kind, x, image, batch)
            if size > 4:
                features[f"{size}x{size}"] = _pairs(x, batch)[0]
                x = self._block(x, size)
                image = downsample(image) if self.architecture == "skip" else image
        x = group_deviation(x, group=self.minibatch_group) if self.minibatch_group else x
        x = features["4x4"] = self._conv(self._width(4), 3, "conv4")(x)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # As wide as the maps below 4x4 would be.
        dense = EqualizedDense(self._width(2), activate=True, **types, name="dense")
        return dense(x.reshape(batch, -1)), features

    def _width(self, size: int) -> int:
        return count_channels(size, self.fmap_base, self.fmap_max)

    def _conv(self, features: int, size: int, name: str, **options: Any) -> EqualizedConv:
        return EqualizedConv(features, size, **options, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def _block(self, x: Maps, size: int) -> NewMaps:
        """Two convolutions, the second of which halves the size."""
        y = self._conv(x.shape[-1], 3, f"conv{size}")(x)
        y = self._conv(self._width(size // 2), 3, f"down{size}", resample="down")(y)
        if self.architecture == "skip":
            return y
        short = self._conv(self._width(size // 2), 1, f"shortcut{size}", resample="down", activate=False)(x)
        return (y + short) * jnp.asarray(math.sqrt(0.5), y.dtype)

    def _attend(self, kind: str, x: Array, image: Array, batch: int) -> tuple[Array, Array]:
        """The maps after attention, and the images that they are of; after a reference's, the primary ones alone."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block: Any = self_attention(kind, x.shape[-1], **types, name=f"{kind}_attention{x.shape[1]}")
        if kind != "reference":
            return block(x), image
        return block(*_pairs(x, batch)), _pairs(image, batch)[0]


def _pairs(
    x: Float[Array, "rows height width channels"], batch: int
) -> tuple[Float[Array, "{batch} height width channels"], Float[Array, "{batch} height width channels"]]:
    """The primary and the reference maps; the same where there are no references (any more)."""
    pairs = x.reshape(batch, -1, *x.shape[1:])
    return pairs[:, 0], pairs[:, -1]


def check_images(images: Array, resolution: int, channels: int) -> None:
    """Stops images of another size.

    Raises:
      UserError: if so.
    """
    if images.shape[1:] != (resolution, resolution, channels):
        raise UserError(f"images must be [batch, {resolution}, {resolution}, {channels}], got {list(images.shape)}.")


def check_references(images: Array, references: Array | None, wanted: bool) -> None:
    """Stops references that are missing, not asked for, or of another shape than the images.

    Raises:
      UserError: if so.
    """
    if not wanted and references is not None:
        raise UserError("references are given, but the model has no reference attention and takes none.")
    if wanted and (references is None or references.shape != images.shape):
        got = "none" if references is None else list(references.shape)
        raise UserError(f"references must be real images {list(images.shape)}, one for each of images; got {got}.")


class StyleGAN2Discriminator(nn.Module):
    """Logits of images: residual blocks that halve the size, statistics over groups of images, two dense layers.

    With a "reference" block images and references pass through the same layers down to that resolution; what follows
    sees its result alone. The logits' dtype is float32 at least.

    Attributes:
      resolution: of images, a power of two from 8 to 1024.
      channels: of images.
      fmap_base: maps of resolution r have 2 fmap_base / r channels (the paper's config-f: 16384, config-e: 8192),
      fmap_max: but at most so many.
      architecture: "resnet" or "skip" (the image enters at every resolution).
      attention: pairs (resolution, kind): those of `StyleGAN2Generator`, or "reference", of which there is at most one;
        blocks precede the convolutions of that resolution.
      minibatch_group: images over which deviations are taken, see `layers.group_deviation`; 0 for none.
      condition_dim: width of the condition, which is projected on the last vector; 0 for none.
      dtype: of the layers.
      param_dtype: of the parameters.

    References: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020; Yu et al., Dual
      Contrastive Loss and Attention for GANs, ICCV 2021 (attention).
    """

    resolution: int
    channels: int = 3
    fmap_base: int = 16384
    fmap_max: int = 512
    architecture: str = "resnet"
    attention: tuple[tuple[int, str], ...] = ()
    minibatch_group: int = 4
    condition_dim: int = 0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Maps,
        references: Maps | None = None,
        condition: Condition | None = None,
        train: bool = False,
    ) -> Judged:
        """Logits and maps of images [batch, resolution, resolution, channels].

        `features` holds the maps that enter each resolution's block, and "4x4", those of the last convolution.

        Raises:
          UserError: on shapes that do not fit the attributes, and on references or a condition that are missing or not
            asked for.
        """
        del train  # the same in both
        _check_trunk(self)
        check_images(images, self.resolution, self.channels)
        check_condition(condition, self.condition_dim)
        check_references(images, references, any(kind == "reference" for _, kind in self.attention))
        vectors, features = _trunk(self, self.attention, self.minibatch_group)(images, references)
        types: dict[str, Any] = {"dtype": at_least_float32(self.dtype), "param_dtype": self.param_dtype}
        outputs = EqualizedDense(1 + self.condition_dim, **types, name="logits")(vectors)
        return Judged(project(outputs, condition), features)


class StyleGAN2Encoder(nn.Module):
    """Any number of outputs for each image: the trunk of `StyleGAN2Discriminator` without statistics over images.

    Attributes:
      outputs: of the last dense layer, which is linear: latents and logits of bits, say.
      The others are those of `StyleGAN2Discriminator`; attention takes no references.

    Reference: Yu et al., Responsible Disclosure of Generative Models Using Scalable Fingerprinting, ICLR 2022.
    """

    resolution: int
    outputs: int
    channels: int = 3
    fmap_base: int = 16384
    fmap_max: int = 512
    architecture: str = "resnet"
    attention: tuple[tuple[int, str], ...] = ()
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Maps, train: bool = False) -> Float[Array, "batch outputs"]:
        """Maps images [batch, resolution, resolution, channels] to [batch, outputs], float32 at least.

        Raises:
          UserError: on shapes that do not fit the attributes.
        """
        del train  # the same in both
        _check_trunk(self, SELF_ATTENTION)
        check_images(images, self.resolution, self.channels)
        vectors, _ = _trunk(self, self.attention, 0)(images, None)
        types: dict[str, Any] = {"dtype": at_least_float32(self.dtype), "param_dtype": self.param_dtype}
        return EqualizedDense(self.outputs, **types, name="outputs")(vectors)


def _check_trunk(model: StyleGAN2Discriminator | StyleGAN2Encoder, kinds: tuple[str, ...] = ATTENTION) -> None:
    check_resolution(model.resolution, model.attention, kinds)
    if model.architecture not in ("skip", "resnet"):
        raise unknown("architecture", model.architecture, ("skip", "resnet"))
    if sum(kind == "reference" for _, kind in model.attention) > 1:
        raise UserError("attention: at most one block can take references.")


def _trunk(
    model: StyleGAN2Discriminator | StyleGAN2Encoder, attention: tuple[tuple[int, str], ...], minibatch_group: int
) -> Trunk:
    """The trunk of a model (call in a compact method)."""
    return Trunk(
        model.resolution,
        model.fmap_base,
        model.fmap_max,
        model.architecture,
        attention,
        minibatch_group,
        model.dtype,
        model.param_dtype,
        name="trunk",
    )
