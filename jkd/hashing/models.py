"""Networks that encode inputs of one kind as the logits of binary codes, in Flax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from jkd.checks import Tensor
from jkd.errors import UserError, unknown
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32
from jkd.nn.outputs import Outputs

NORMS = ("layer", "none")
Inputs = Num[Tensor, "batch *example"]
Mask = Bool[Tensor, "batch tokens"]


def _dense(module: Any, units: int, name: str, **inits: Any) -> nn.Dense:
    return nn.Dense(
        units,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        promote_dtype=mixed.promote,
        dot_general=mixed.dot_general,
        name=name,
        **inits,
    )


def pool_tokens(vectors: Float[Tensor, "batch tokens dim"], mask: Mask) -> Float[Array, "batch dim"]:
    """The mean of the vectors that are there, in float32 at least; zeros for a text of none."""
    values, there = jnp.asarray(vectors, at_least_float32(vectors.dtype)), jnp.asarray(mask)
    kept = jnp.where(there[..., None], values, 0)
    return kept.sum(1) / jnp.maximum(there.sum(1, keepdims=True), 1).astype(values.dtype)


class HashEncoder(nn.Module):
    """Dense layers from features to the logits of a code's bits: q = sigmoid(logits), the code is their signs.

    Images and tokens come through a `backbone`, such as a network of `jkd.nn`, whose logits are the features; tokens
    without one are averaged where the mask says they are there.

    Attributes:
      bits: L, at least 1.
      hidden: widths of the hidden layers; () is a linear hash function.
      norm: "layer" (normalization before each ReLU) or "none".
      dropout: share of hidden units that are dropped in training, in [0, 1).
      head_scale: the last layer's weights begin as small as this share of the others', so that all q are near 1/2.
      backbone: called with (inputs, train=...), and `mask` where there is one; returns `Outputs`.
      dtype: of the hidden layers; the logits are float32 at least.
      param_dtype: of the parameters.

    Raises:
      UserError: where a field is not as above.
    """

    bits: int
    hidden: tuple[int, ...] = (512,)
    norm: str = "layer"
    dropout: float = 0.1
    head_scale: float = 0.1
    backbone: nn.Module | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if min(self.bits, *self.hidden, 1) < 1 or not 0 <= self.dropout < 1 or not self.head_scale > 0:
            raise UserError(
                "A HashEncoder needs bits and hidden widths >= 1, dropout in [0, 1) and head_scale > 0, got "
                f"{self.bits}, {self.hidden}, {self.dropout} and {self.head_scale}."
            )
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Inputs, train: bool = False, *, mask: Mask | None = None) -> Outputs:
        """Returns logits [batch, bits] and the features "pool", the last hidden layer.

        In training, dropout needs the key "dropout".
        """
        x = self._features(inputs, mask, train)
        for i, units in enumerate(self.hidden, start=1):
            x = _dense(self, units, f"hidden{i}", kernel_init=nn.initializers.he_normal())(x)
            if self.norm == "layer":
                x = nn.LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype, name=f"norm{i}")(x)
            x = nn.relu(x)
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        small = nn.initializers.variance_scaling(self.head_scale**2, "fan_in", "normal")
        logits = _dense(self, self.bits, "logits", kernel_init=small)(x)
        wide = at_least_float32(self.dtype)
        return Outputs(logits.astype(wide), {"pool": x.astype(wide)})

    def _features(self, inputs: Inputs, mask: Mask | None, train: bool) -> Array:
        if self.backbone is not None:
            more = {} if mask is None else {"mask": mask}
            return self.backbone(inputs, train=train, **more).logits
        if mask is not None:
            return pool_tokens(inputs, mask)
        return jnp.asarray(inputs).reshape(inputs.shape[0], math.prod(inputs.shape[1:]))


class CodeCritic(nn.Module):
    """Predicts the bits of one side's code from the probabilities of the other's: q [batch, bits] to logits.

    Two layers, of 2 L units and L. It reads 2 q - 1, so that its input is centered.

    Attributes:
      bits: L.
      dtype: of the hidden layer; the logits are float32 at least.
      param_dtype: of the parameters.
    """

    bits: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, probabilities: Float[Tensor, "batch bits"]) -> Float[Array, "batch bits"]:
        """Returns the logits of the prediction."""
        x = jax.nn.relu(_dense(self, 2 * self.bits, "hidden")(2 * probabilities - 1))
        return _dense(self, self.bits, "logits")(x).astype(at_least_float32(self.dtype))
