"""Convolutional generators and discriminators with batch normalization, for small square images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array

from jkd.errors import UserError, unknown
from jkd.gan.checks import check_condition
from jkd.gan.outputs import Generated, Judged
from jkd.gan.resampling import Maps, NewMaps, conv_down, conv_up
from jkd.gan.stylegan2 import Condition, Latents
from jkd.gan.stylegan2_discriminator import check_images, check_references, project
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32, check_width

NORMS = ("batch", "spectral", "none")
SMALL = nn.initializers.normal(0.02)


def image_sizes(image_size: int) -> list[int]:
    """The sizes of all maps, from 4 (or 7) to the images'.

    Raises:
      UserError: unless image_size is 28, or 4 times a power of two and at least 8.
    """
    sizes = [7 if image_size == 28 else 4]
    while sizes[-1] < image_size:
        sizes.append(2 * sizes[-1])
    if sizes[-1] != image_size or len(sizes) < 2:
        raise UserError(f"image_size must be 28, or 4 times a power of two and at least 8, got {image_size}.")
    return sizes


class Conv4(nn.Module):
    """A 4x4 convolution that doubles (`conv_up`) or halves (`conv_down`) the map, its weights from N(0, 0.02^2).

    Attributes:
      features: output channels.
      resize: `resampling.conv_up` or `resampling.conv_down`.
      use_bias: whether there is a bias, 0 at first.
      dtype: of the product and the output.
      param_dtype: of the parameters.
    """

    features: int
    resize: Callable[[Any, Any], Any]
    use_bias: bool = True
    kernel_init: Initializer = SMALL
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        """Maps [batch, height, width, channels] to twice or half the size, in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (4, 4, x.shape[-1], self.features), self.param_dtype)
        y = self.resize(x.astype(self.dtype), kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return (y + bias.reshape(1, 1, 1, -1)).astype(self.dtype)


class ConditionalNorm(nn.Module):
    """Batch normalization; with a condition y its scale and bias are 1 + A y and B y, A and B from N(0, 0.02^2).

    Statistics are over the whole batch, in float32 at least; running ones move by a tenth a step.

    Reference: de Vries et al., Modulating Early Visual Processing by Language, NeurIPS 2017.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, condition: Condition | None, train: bool) -> NewMaps:
        """Maps to maps of the same shape, in `dtype`."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = condition is None
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            use_scale=plain,
            use_bias=plain,
            force_float32_reductions=jnp.finfo(self.dtype).bits <= 32,
            **types,
            name="norm",
        )(x)
        if condition is None:
            return x
        scale, bias = (
            _dense(x.shape[-1], name, use_bias=False, **types)(condition).reshape(len(x), 1, 1, -1).astype(self.dtype)
            for name in ("scale", "bias")
        )
        return (1 + scale) * x + bias


def _dense(
    units: int, name: str | None, *, dtype: DTypeLike, param_dtype: DTypeLike, use_bias: bool = True
) -> nn.Dense:
    """A dense layer whose weights are from N(0, 0.02^2); its output is as wide as the bias, `param_dtype`."""
    return nn.Dense(
        units,
        use_bias=use_bias,
        kernel_init=SMALL,
        dtype=dtype,
        param_dtype=param_dtype,
        promote_dtype=mixed.promote,
        dot_general=mixed.dot_general,
        name=name,
    )


class DCGANGenerator(nn.Module):
    """Images from latents: a dense layer to 4x4 (or 7x7), 4x4 convolutions that double the size, tanh.

    Batch normalization and ReLU follow all layers but the last, so `train=True` changes `batch_stats`.

    Attributes:
      image_size: 28, or 4 times a power of two and at least 8.
      channels: of images.
      latent_dim: of latents.
      width: channels before the last layer; they double towards smaller maps,
      max_width: but are at most so many.
      condition_dim: width of the condition, which scales and shifts after each normalization; 0 for none.
      dtype: of the layers; images are in float32 at least.
      param_dtype: of the parameters.

    References: Radford, Metz and Chintala, Unsupervised Representation Learning with Deep Convolutional Generative
      Adversarial Networks, ICLR 2016; Brock, Donahue and Simonyan, Large Scale GAN Training for High Fidelity Natural
      Image Synthesis, ICLR 2019 (conditions).
    """

    image_size: int
    channels: int = 3
    latent_dim: int = 100
    width: int = 64
    max_width: int = 512
    condition_dim: int = 0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: Latents, condition: Condition | None = None, train: bool = False) -> Generated:
        """Images in [-1, 1], and the maps of each resolution below theirs.

        Raises:
          UserError: on attributes or shapes that do not fit.
        """
        check_width(self.width)
        check_condition(condition, self.condition_dim)
        if latents.shape[1:] != (self.latent_dim,):
            raise UserError(f"latents must be [batch, {self.latent_dim}], got {list(latents.shape)}.")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        first, *sizes = image_sizes(self.image_size)
        widths = [min(self.width * 2**i, self.max_width) for i in range(len(sizes))][::-1]
        x = _dense(first**2 * widths[0], "start", **types, use_bias=False)(latents.astype(self.dtype))
        x, features = x.reshape(-1, first, first, widths[0]), {}
        for size, wider in zip((first, *sizes), (*widths[1:], self.channels), strict=False):
            x = nn.relu(ConditionalNorm(**types, name=f"norm{size}")(x, condition, train))
            features[f"{size}x{size}"] = x
            x = Conv4(wider, conv_up, use_bias=2 * size == self.image_size, **types, name=f"up{2 * size}")(x)
        return Generated(jnp.tanh(x.astype(at_least_float32(self.dtype))), features)


class DCGANDiscriminator(nn.Module):
    """Logits of images: 4x4 convolutions that halve the size down to 4x4 (or 7x7), leaky ReLU, a dense layer.

    Attributes:
      image_size: 28, or 4 times a power of two and at least 8.
      channels: of images.
      width: channels after the first layer; they double towards smaller maps,
      max_width: but are at most so many.
      norm: "batch" (normalization after all convolutions but the first), "spectral" (weights over their largest
        singular value, by a power iteration a step of training) or "none". A penalty on slopes wants no "batch", which
        passes slopes from image to image.
      condition_dim: width of the condition, which is projected on the last maps; 0 for none.
      dtype: of the layers; logits are in float32 at least.
      param_dtype: of the parameters.

    References: Radford, Metz and Chintala, Unsupervised Representation Learning with Deep Convolutional Generative
      Adversarial Networks, ICLR 2016; Miyato et al., Spectral Normalization for Generative Adversarial Networks, ICLR
      2018; Miyato and Koyama, cGANs with Projection Discriminator, ICLR 2018.
    """

    image_size: int
    channels: int = 3
    width: int = 64
    max_width: int = 512
    norm: str = "batch"
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
        """Logits of images [batch, image_size, image_size, channels], and the maps of each resolution below theirs.

        Raises:
          UserError: on attributes or shapes that do not fit, on references, and on a condition that is missing or not
            asked for.
        """
        check_width(self.width)
        sizes = image_sizes(self.image_size)[-2::-1]
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        check_images(images, self.image_size, self.channels)
        check_condition(condition, self.condition_dim)
        check_references(images, references, False)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, features = images, {}
        for i, size in enumerate(sizes):
            batch = self.norm == "batch" and i > 0
            width = min(self.width * 2**i, self.max_width)
            x = self._limited(Conv4(width, conv_down, not batch, **types, name=f"down{size}"), train)(x)
            x = ConditionalNorm(**types, name=f"norm{size}")(x, None, train) if batch else x
            x = features[f"{size}x{size}"] = jax.nn.leaky_relu(x, 0.2)
        last = self._limited(_dense(1 + self.condition_dim, "logits", **types), train)
        return Judged(project(last(x.reshape(len(x), -1)), condition), features)

    def _limited(self, layer: nn.Module, train: bool) -> Callable[[Array], Array]:
        """The layer, with spectral normalization where asked for."""
        if self.norm != "spectral":
            return layer
        limit = nn.SpectralNorm(layer, name=f"{layer.name}_norm")
        return lambda x: limit(x, update_stats=train)
