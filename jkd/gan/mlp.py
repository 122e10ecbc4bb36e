"""Generators, discriminators and encoders of dense layers, for small images."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError
from jkd.gan.checks import check_condition
from jkd.gan.modulation import modulated_conv, modulated_kernel
from jkd.gan.outputs import Generated, Judged
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32, check_images, keep

# Of any width: one annotation may hold several.
Vectors = Float[Array, "batch _"]


def _dense(layer: nn.Module, units: int, name: str, *, dtype: DTypeLike | None = None, **inits: Any) -> nn.Dense:
    """A dense layer of a compact method, with kernels from N(0, 2 / fan_in): signals keep their size through ReLU."""
    return nn.Dense(
        units,
        kernel_init=inits.pop("kernel_init", nn.initializers.he_normal()),
        dtype=dtype or layer.dtype,
        param_dtype=layer.param_dtype,
        promote_dtype=mixed.promote,
        dot_general=mixed.dot_general,
        name=name,
        **inits,
    )


class ModulatedDense(nn.Module):
    """A dense layer whose weights a style scales for each example, by `modulated_conv`; the scales begin about 1.

    Attributes:
      features: outputs.
      demodulate: whether each output's weights have unit norm.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    features: int
    demodulate: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Vectors, style: Vectors) -> Vectors:
        """Maps x [batch, inputs] by the style [batch, style_dim] to [batch, features], in float32 at least."""
        # Styles as large as the ones that they are added to: what changes nothing at first is never learned to be read.
        scales = _dense(self, x.shape[-1], "style", bias_init=nn.initializers.ones)(style)
        kernel = self.param("kernel", nn.initializers.he_normal(), (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        y = modulated_conv(x.astype(self.dtype), kernel, scales, demodulate=self.demodulate)
        return y.astype(at_least_float32(self.dtype)) + bias[None]


class _Mapping(nn.Module):
    """Two dense layers with ReLU from a condition to a style."""

    style_dim: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, condition: Vectors) -> Vectors:
        x = condition
        for i in (1, 2):
            x = nn.relu(_dense(self, self.style_dim, f"layer{i}")(x))
        return x


class _Synthesis(nn.Module):
    """Dense layers with ReLU from a vector to an image, modulated where there is a style."""

    shape: tuple[int, int, int]
    hidden: tuple[int, ...]
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Vectors, style: Vectors | None) -> Generated:
        features = {}
        for i, units in enumerate(self.hidden, start=1):
            x = keep(nn.relu(self._layer(x, style, units, f"hidden{i}", True)).astype(self.dtype))
            features[f"hidden{i}"] = x
        pixels = self._layer(x, style, math.prod(self.shape), "head", False)
        images = jnp.tanh(pixels.astype(at_least_float32(self.dtype)))
        return Generated(images.reshape(len(x), *self.shape), features)

    def _layer(self, x: Vectors, style: Vectors | None, units: int, name: str, demodulate: bool) -> Vectors:
        if style is None:
            return _dense(self, units, name)(x)
        return ModulatedDense(units, demodulate, self.dtype, self.param_dtype, name=name)(x, style)


class MLPGenerator(nn.Module):
    """Dense layers with ReLU from a latent to an image, which a tanh bounds.

    With a condition (a class as one-hot, or the bits of a fingerprint) a mapping of two dense layers makes a style of
    it, and every layer is modulated by that style: all but the last are demodulated.

    Attributes:
      shape: of an image.
      hidden: units of each hidden layer.
      condition_dim: numbers in a condition; 0: none.
      style_dim: units of the mapping's two layers.
      dtype: of the hidden layers.
      param_dtype: of the parameters.
    """

    shape: tuple[int, int, int]
    hidden: tuple[int, ...] = (128, 128)
    condition_dim: int = 0
    style_dim: int = 64
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes the two parts."""
        if self.condition_dim:
            self.mapper = _Mapping(self.style_dim, self.dtype, self.param_dtype)
        self.synthesis = _Synthesis(self.shape, self.hidden, self.dtype, self.param_dtype)

    def baked(self) -> "MLPGenerator":
        """The plain generator that `gan.bake_fingerprint` makes parameters for."""
        return self.clone(condition_dim=0)

    def bake(self, params: Any, condition: Float[Array, " numbers"]) -> Any:
        """Parameters of `baked()` that make the images of this one condition: see `gan.bake_fingerprint`."""
        styles = self.apply({"params": params}, condition[None], condition[None], method="mapping")
        made = {name: dict(layer) for name, layer in params["synthesis"].items()}
        for name, layer in made.items():
            affine = layer.pop("style")
            style = (styles @ affine["kernel"] + affine["bias"][None])[0]
            layer["kernel"] = modulated_kernel(layer["kernel"], style, demodulate=name != "head")
        return {"synthesis": made}

    def mapping(self, latents: Vectors, condition: Vectors | None = None) -> Vectors:
        """What path lengths are measured in: the style of a condition, or without one the latents themselves."""
        check_condition(condition, self.condition_dim)
        return latents if condition is None else self.mapper(condition)

    def synthesize(self, styles: Vectors, latents: Vectors) -> Generated:
        """The images of what `mapping` gives; the latents count only where there is a condition."""
        return self.synthesis(latents, styles) if self.condition_dim else self.synthesis(styles, None)

    def __call__(self, latents: Vectors, condition: Vectors | None = None, train: bool = False) -> Generated:
        """Returns images in (-1, 1) and the features "hidden1" ... "hiddenN"."""
        del train
        return self.synthesize(self.mapping(latents, condition), latents)


class MLPDiscriminator(nn.Module):
    """Dense layers with leaky ReLU (0.2) from an image to one logit.

    Attributes:
      hidden: units of each hidden layer, one at least.
      condition_dim: numbers in a condition, whose embedding is projected on the last hidden layer; 0: none.
      dtype: of the hidden layers.
      param_dtype: of the parameters.
    """

    hidden: tuple[int, ...] = (128, 128)
    condition_dim: int = 0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        references: Float[Array, "batch height width channels"] | None = None,
        condition: Vectors | None = None,
        train: bool = False,
    ) -> Judged:
        """Returns a logit for each image and the features "hidden1" ... "hiddenN"; there is no use for references."""
        del references, train
        check_condition(condition, self.condition_dim)
        x, features = _hidden(self, images)
        pooled = x.astype(at_least_float32(self.dtype))
        logits = _dense(self, 1, "head", dtype=pooled.dtype)(pooled)[:, 0]
        if condition is not None:
            embedded = _dense(self, pooled.shape[-1], "condition", dtype=pooled.dtype, use_bias=False)(condition)
            logits = logits + (embedded * pooled).sum(-1)
        return Judged(logits, features)


class MLPEncoder(nn.Module):
    """Dense layers with leaky ReLU (0.2) from an image to any number of outputs, such as a latent and bits.

    Attributes:
      outputs: how many.
      hidden: units of each hidden layer, one at least.
      dtype: of the hidden layers.
      param_dtype: of the parameters.
    """

    outputs: int
    hidden: tuple[int, ...] = (256, 256)
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], train: bool = False) -> Vectors:
        """Returns [batch, outputs], float32 at least."""
        del train
        x, _ = _hidden(self, images)
        pooled = x.astype(at_least_float32(self.dtype))
        return _dense(self, self.outputs, "head", dtype=pooled.dtype)(pooled)


def _hidden(layer: MLPDiscriminator | MLPEncoder, images: Array) -> tuple[Array, dict[str, Array]]:
    """The hidden layers of one compact method, and what they give by name."""
    if not layer.hidden:
        raise UserError("hidden must name the units of one layer at least, got ().")
    images = check_images(images, rank=4)
    x, features = images.reshape(len(images), math.prod(images.shape[1:])), {}
    for i, units in enumerate(layer.hidden, start=1):
        x = keep(nn.leaky_relu(_dense(layer, units, f"hidden{i}")(x), 0.2).astype(layer.dtype))
        features[f"hidden{i}"] = x
    return x, features
