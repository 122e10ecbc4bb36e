"""Hashing networks: convolutions over the words of a text, and layers behind images or features."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jkd.checks import Tensor, concrete
from jkd.errors import UserError
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32, head, keep, linear
from jkd.nn.outputs import Outputs


def _check_bits(bits: int) -> None:
    if bits < 1:
        raise UserError(f"bits must be at least 1, got {bits}.")


class TextCNNHash(nn.Module):
    """Logits of the bits of a text from its word vectors: parallel convolutions of several widths, maxima over time.

        c_w = ReLU(conv_w(x) + b_w),    f = [max_t c_1, max_t c_2, ..],    logits = dense(dropout(f))

    over the valid words only: words that `mask` leaves out count as zeros, which also stand before and behind the
    text, so that padding changes nothing.

    Attributes:
      bits: at least 1.
      widths: of the convolutions, in words.
      filters: of each width.
      dropout: share of features that is dropped in training, in [0, 1); needs the key "dropout".
      dtype: of the convolutions; features and logits are float32 at least.
      param_dtype: of the parameters.

    Raises:
      UserError: where a field is not as above; for words of another shape than [batch, words, dim], or a mask of
        another shape; for a text that is known to have no valid word (a traced one has NaN logits).

    Reference: the kind of network is that of Kim, Convolutional Neural Networks for Sentence Classification, EMNLP
      2014; widths and sizes are ours.
    """

    bits: int
    widths: Sequence[int] = (1, 2, 3, 4, 5)
    filters: int = 128
    dropout: float = 0.5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        _check_bits(self.bits)
        if not self.widths or min(self.widths) < 1 or self.filters < 1:
            raise UserError(
                f"widths must be at least one number >= 1 and filters >= 1, got {self.widths}, {self.filters}."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        words: Float[Tensor, "batch words dim"],
        train: bool = False,
        *,
        mask: Bool[Tensor, "batch words"] | None = None,
    ) -> Outputs:
        """Returns logits [batch, bits] and the features "pool", the maxima; without a mask all words are valid."""
        x, valid = _words(words, mask)
        x = jnp.where(valid[..., None], x, 0).astype(self.dtype)
        maxima = [self._maxima(x, valid, width) for width in self.widths]
        pool = jnp.concatenate(maxima, axis=1).astype(at_least_float32(self.dtype))
        kept = nn.Dropout(self.dropout, deterministic=not train)(pool)
        logits = head(kept, self.bits, self.param_dtype)
        # Not the code that the biases alone make.
        logits = jnp.where(valid.any(1)[:, None], logits, jnp.nan)
        return Outputs(logits, {"pool": pool})

    def _maxima(self, x: Array, valid: Array, width: int) -> Array:
        layer = nn.Conv(
            self.filters,
            (width,),
            padding=[((width - 1) // 2, width // 2)],
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=mixed.promote,
            conv_general_dilated=mixed.conv_general_dilated,
            name=f"conv{width}",
        )
        found = keep(nn.relu(layer(x).astype(self.dtype)))
        return jnp.where(valid[..., None], found, 0).max(1)  # after ReLU nothing is below 0


def _words(words: Any, mask: Any) -> tuple[Array, Array]:
    if jnp.ndim(words) != 3 or not jnp.issubdtype(words.dtype, jnp.floating):
        raise UserError(f"words must be floating point [batch, words, dim], got {words.dtype}{list(jnp.shape(words))}.")
    if mask is None:
        return jnp.asarray(words), jnp.ones(words.shape[:2], bool)
    if jnp.shape(mask) != words.shape[:2] or mask.dtype != jnp.bool_:
        raise UserError(
            f"mask must be boolean {list(words.shape[:2])}, as the words are, got {mask.dtype}{list(jnp.shape(mask))}."
        )
    known = concrete(mask)
    if known is not None and not known.any(1).all():
        raise UserError(f"mask leaves no valid word in text {int(known.any(1).argmin())}: an empty text has no code.")
    return jnp.asarray(words), jnp.asarray(mask)


class ImageHashNet(nn.Module):
    """Logits of the bits of an image: a backbone, a hidden layer with ReLU, and a dense layer.

        logits = dense(ReLU(h)),    h = the backbone's logits, or a dense layer on features given in its place

    Attributes:
      bits: at least 1.
      backbone: a model of `jkd.nn` whose "classes" are the units of the hidden layer; None for features in the place
        of images, which may have any shape.
      hidden: units of the hidden layer without a backbone.
      dtype: of the hidden layer; logits are float32 at least.
      param_dtype: of the parameters.

    Raises:
      UserError: where a field is not as above, or the input is not floating point.
    """

    bits: int
    backbone: nn.Module | None = None
    hidden: int = 512
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        _check_bits(self.bits)
        if self.hidden < 1:
            raise UserError(f"hidden must be at least 1, got {self.hidden}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Tensor, " batch *image"], train: bool = False) -> Outputs:
        """Returns logits [batch, bits] and the features "pool", the hidden layer, beside those of the backbone."""
        if jnp.ndim(images) < 2 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images must be floating point [batch, ..], got {images.dtype}{list(jnp.shape(images))}.")
        if self.backbone is None:
            x, features = jnp.asarray(images).reshape(len(images), -1).astype(self.dtype), {}
            x = linear(x.shape[-1], self.hidden, self.dtype, self.param_dtype, "hidden")(x)
        else:
            seen = self.backbone(images, train=train)
            x, features = seen.logits, dict(seen.features)
        pool = keep(jax.nn.relu(x).astype(at_least_float32(self.dtype)))
        return Outputs(head(pool, self.bits, self.param_dtype), {**features, "pool": pool})
