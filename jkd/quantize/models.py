"""Flax layers with low-bit weights and activations; whole models are quantized by `transform`, without these."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
from jkd.nn import mixed
from jkd.quantize.activations import MODES, channel_weights, quantize_activation, weighted_basis_update
from jkd.quantize.direct import direct_quantize, init_assignment
from jkd.quantize.levels import activation_basis, check_bits, levels_from_basis, weight_basis


class _Quantized(nn.Module):
    """A kernel of chosen levels."""

    shape: Sequence[int]
    bits: int
    tau: float
    gradient: str

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        basis = weight_basis(tuple(self.shape), self.bits)
        levels = self.param("levels", lambda key: levels_from_basis(basis, signed=True).values)

        def scores(key: jax.Array) -> Array:
            # Weights as large as the levels' middle: which level is nearest is drawn at random.
            drawn = jax.random.normal(key, tuple(self.shape)) * levels.std()
            return init_assignment(drawn, levels)

        return direct_quantize(self.param("assignment", scores), levels, self.tau, gradient=self.gradient)


def _biased(layer: "DirectQuantDense | DirectQuantConv", y: Array) -> Array:
    if not layer.use_bias:
        return y
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,))
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class DirectQuantDense(nn.Module):
    """A dense layer whose weights are chosen levels: parameters kernel/assignment, kernel/levels, and bias.

    Attributes:
      features: outputs.
      bits: of each weight, 1..8.
      use_bias: whether a full-precision bias is added.
      tau: of the choice's gradient, see `direct_quantize`.
      gradient: "softmax" or "identity".
      dtype: of the product.
    """

    features: int
    bits: int = 2
    use_bias: bool = True
    tau: float = 1.0
    gradient: str = "softmax"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        """Maps [..., inputs] to [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = _Quantized(shape, self.bits, self.tau, self.gradient, name="kernel")()
        y = mixed.dot_general(x.astype(self.dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return _biased(self, y)


class DirectQuantConv(nn.Module):
    """A convolution whose weights are chosen levels, padded by size // 2 on both sides; see `DirectQuantDense`."""

    features: int
    size: int = 3
    stride: int = 1
    bits: int = 2
    use_bias: bool = False
    tau: float = 1.0
    gradient: str = "softmax"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = _Quantized(shape, self.bits, self.tau, self.gradient, name="kernel")()
        y = mixed.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (self.stride, self.stride),
            [(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return _biased(self, y)


class ActQuant(nn.Module):
    """Low-bit activations (>= 0, channels last) whose basis follows them, in the collection "quant_stats".

    In training the basis moves by `1 - momentum` towards the least-squares one of the batch, after it was used; in
    evaluation it stays.

    Attributes:
      bits: of each activation, 1..8.
      mode: how channels are weighted, see `channel_weights`.
      momentum: of the moving average, in [0, 1).
    """

    bits: int = 2
    mode: str = "variance"
    momentum: float = 0.9

    def __post_init__(self):
        check_bits(self.bits)
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"], train: bool) -> Float[Array, "*batch channels"]:
        """Returns the activations as levels, in at least float32."""
        basis = self.variable("quant_stats", "basis", lambda: jnp.asarray(activation_basis(self.bits)))
        quantized = quantize_activation(x, basis.value)
        if train and not self.is_initializing():
            error = jnp.square(x - quantized).mean(tuple(range(x.ndim - 1)))
            weights = channel_weights(x, self.mode, error=error)
            found = weighted_basis_update(x, basis.value, weights)
            basis.value = self.momentum * basis.value + (1 - self.momentum) * found
        return quantized
