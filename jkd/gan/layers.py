"""Layers of StyleGAN2: weights that are scaled when they are used, styles, noise and statistics of groups of images."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jkd.errors import UserError, unknown
from jkd.gan.attention import ReferenceAttention, SelfAttention2D, TokenAttention
from jkd.gan.modulation import modulated_conv
from jkd.gan.patch_attention import DynamicFilter, PatchwiseSelfAttention
from jkd.gan.resampling import Maps, NewMaps, downsample, filtered_conv_down, filtered_conv_up, upsample
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32

RESAMPLING = ("none", "up", "down")
SELF_ATTENTION = ("global", "patchwise", "dynamic", "tokens")
ATTENTION = (*SELF_ATTENTION, "reference")


def leaky_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sqrt(2) max(x, 0.2 x): keeps the second moment of what is symmetric, but for 4 %."""
    return math.sqrt(2) * jax.nn.leaky_relu(x, 0.2)


def normalize_pixels(x: Float[Array, "batch dim"], *, eps: float = 1e-8) -> Float[Array, "batch dim"]:
    """Each vector over its root mean square: x / sqrt(mean_d x_d^2 + eps). Zeros stay, with a finite slope."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def _bias(layer: nn.Module, features: int, rank: int, start: float = 0.0) -> Array:
    """A bias that broadcasts over arrays of this rank (call in a compact method)."""
    bias = layer.param("bias", nn.initializers.constant(start), (features,), layer.param_dtype)
    return bias.reshape((1,) * (rank - 1) + (-1,))


def equalized_kernel(kernel: Float[Array, "*window inputs outputs"]) -> Float[Array, "*window inputs outputs"]:
    """What a stored kernel is used as: over sqrt(fan_in), so that all layers learn at one pace."""
    return kernel / math.sqrt(math.prod(kernel.shape[:-1]))


class EqualizedDense(nn.Module):
    """A dense layer whose weights are drawn from N(0, 1) / m and used as m / sqrt(inputs) times that.

        y = x ( m W / sqrt(inputs) ) + m b,    then leaky_relu where `activate`

    Adam's steps then are the same share of the weights in every layer, m times as fast as its learning rate says.

    Attributes:
      features: outputs.
      lr_multiplier: m, > 0.
      bias_init: of m b.
      activate: whether `leaky_relu` follows.
      dtype: of the product and the output.
      param_dtype: of the parameters.

    Reference: Karras et al., Progressive Growing of GANs for Improved Quality, Stability, and Variation, ICLR 2018.
    """

    features: int
    lr_multiplier: float = 1.0
    bias_init: float = 0.0
    activate: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch features"]:
        """Maps [batch, inputs] to [batch, features] in `dtype`."""
        start = nn.initializers.normal(1 / self.lr_multiplier)
        kernel = self.param("kernel", start, (x.shape[-1], self.features), self.param_dtype)
        kernel = self.lr_multiplier * equalized_kernel(kernel)
        y = mixed.dot_general(x.astype(self.dtype), kernel, (((1,), (0,)), ((), ())))
        y = y + self.lr_multiplier * _bias(self, self.features, 2, self.bias_init / self.lr_multiplier)
        return (leaky_relu(y) if self.activate else y).astype(self.dtype)


def _resampled(x: Maps, kernel: Array, resample: str) -> NewMaps:
    """The convolution with zero padding to the same, twice or half the size."""
    if kernel.shape[0] == 1:
        # A 1x1 convolution and the filter can change places: the smaller map has fewer products.
        x = downsample(x) if resample == "down" else x
        y = mixed.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
        return upsample(y) if resample == "up" else y
    if resample == "none":
        layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        return mixed.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=layout)
    return filtered_conv_up(x, kernel) if resample == "up" else filtered_conv_down(x, kernel)


class EqualizedConv(nn.Module):
    """A 3x3 or 1x1 convolution whose weights are drawn from N(0, 1) and used as 1 / sqrt(fan_in) times that.

    Attributes:
      features: output channels.
      size: of the kernel, 3 or 1.
      resample: "none", "up" or "down": the size of the map doubles or halves, with the filter [1, 3, 3, 1].
      activate: whether a bias and `leaky_relu` follow.
      dtype: of the product and the output.
      param_dtype: of the parameters.
    """

    features: int
    size: int = 3
    resample: str = "none"
    activate: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        """Maps [batch, height, width, channels] to maps with `features` channels, in `dtype`."""
        if self.resample not in RESAMPLING:
            raise unknown("resample", self.resample, RESAMPLING)
        if self.size not in (1, 3):
            raise UserError(f"size must be 1 or 3, got {self.size}.")
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, self.param_dtype)
        y = _resampled(x.astype(self.dtype), equalized_kernel(kernel), self.resample)
        return leaky_relu(y + _bias(self, self.features, 4)).astype(self.dtype) if self.activate else y


class StyledConv(nn.Module):
    """A convolution whose input channels a style scales: modulation, demodulation, noise, bias, `leaky_relu`.

        s = A w + b (b = 1 at first),    y = leaky_relu( modulated_conv(x, W / sqrt(fan_in), s) + a noise + bias )

    Without a style (None) an ordinary convolution, with parameters of the same names but for the affine layer.

    Attributes:
      features: output channels.
      size: of the kernel, 3 or 1.
      up: whether the size of the map doubles, with the filter [1, 3, 3, 1].
      demodulate: whether each output's weights are brought to unit norm; not where channels become colors.
      noise: whether a number per pixel, the same for all channels, is added; its learned strength a is 0 at first.
        It is drawn from the random stream "noise" where there is one, and else the same in every call and image.
      activate: whether `leaky_relu` follows.
      dtype: of the product and the output; what makes the style is in float32 at least.
      param_dtype: of the parameters.

    Reference: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.
    """

    features: int
    size: int = 3
    up: bool = False
    demodulate: bool = True
    noise: bool = True
    activate: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, style: Float[Array, "batch style_dim"] | None) -> NewMaps:
        """Maps [batch, height, width, channels] to maps with `features` channels, in `dtype`."""
        x, wide = x.astype(self.dtype), at_least_float32(self.dtype)
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, self.param_dtype)
        kernel = equalized_kernel(kernel)
        if style is None:
            y = _resampled(x, kernel, "up" if self.up else "none")
        else:
            affine = EqualizedDense(x.shape[-1], bias_init=1.0, dtype=wide, param_dtype=self.param_dtype, name="affine")
            y = modulated_conv(x, kernel, affine(style), demodulate=self.demodulate, up=self.up)
        y = y.astype(wide) + (self._noise(y.shape, wide) if self.noise else 0)
        y = y + _bias(self, self.features, 4)
        return (leaky_relu(y) if self.activate else y).astype(self.dtype)

    def _noise(self, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "batch height width 1"]:
        strength = self.param("noise_strength", nn.initializers.zeros, (), self.param_dtype)
        if self.has_rng("noise"):
            return strength * jax.random.normal(self.make_rng("noise"), (*shape[:3], 1), dtype)
        # The layer's path tells its noise from the other layers'.
        key = _constant_key("/".join(self.path))
        return strength * jax.random.normal(key, (1, *shape[1:3], 1), dtype)


def _constant_key(name: str) -> Key[Array, ""]:
    """A key that a name determines, on any machine."""
    return jax.random.key(sum(byte * 257**i for i, byte in enumerate(name.encode())) % 2**31)


def group_deviation(x: Maps, *, group: int, eps: float = 1e-8) -> Float[Array, "batch height width channels_and_one"]:
    """The maps, and a channel that says how much a group of images differs: the minibatch standard deviation.

        v_g = mean_hwc sqrt( mean_(b in g) ( x_bhwc - mean_(b in g) x_bhwc )^2 + eps )

    A group is `group` neighbors in the global batch, so that a device that holds whole groups asks no other. Where
    `group` does not divide the batch, it is the largest smaller number that does; alone, an image gets sqrt(eps).
    Statistics are in float32 at least.

    Raises:
      UserError: if group is less than 1.

    Reference: Karras et al., Progressive Growing of GANs for Improved Quality, Stability, and Variation, ICLR 2018.
    """
    if group < 1:
        raise UserError(f"group must be at least 1, got {group}.")
    batch = len(x)
    size = max(n for n in range(1, min(group, batch) + 1) if batch % n == 0)
    groups = x.astype(at_least_float32(x.dtype)).reshape(batch // size, size, *x.shape[1:])
    variance = jnp.square(groups - groups.mean(1, keepdims=True)).mean(1)
    deviation = jnp.sqrt(variance + eps).mean((1, 2, 3))
    spread = jnp.broadcast_to(deviation.reshape(-1, 1, 1, 1, 1), (batch // size, size, *x.shape[1:3], 1))
    return jnp.concatenate((x, spread.reshape(*x.shape[:3], 1).astype(x.dtype)), -1)


def self_attention(kind: str, channels: int, *, dtype: DTypeLike, param_dtype: DTypeLike, name: str) -> nn.Module:
    """The block of this kind, one of `ATTENTION`, for maps of so many channels, at its paper's sizes.

    Raises:
      UserError: if the kind is unknown.
    """
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "name": name}
    if kind not in ATTENTION:
        raise unknown("attention", kind, ATTENTION)
    if kind == "tokens":
        return TokenAttention(**types)
    if kind in ("patchwise", "dynamic"):
        over_patches = PatchwiseSelfAttention if kind == "patchwise" else DynamicFilter
        return over_patches(share_planes=math.gcd(8, channels), **types)
    block = SelfAttention2D if kind == "global" else ReferenceAttention
    return block(channels, max(channels // 8, 1), **types)
