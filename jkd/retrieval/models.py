"""Networks that embed images and texts into one space, by several attention heads each."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from jkd.checks import Tensor
from jkd.errors import UserError, unknown
from jkd.nn.layers import at_least_float32, keep, linear
from jkd.retrieval.attention import Pooled, check_some, masked_softmax, multi_head_pool
from jkd.retrieval.sru import GRU, SRU
from jkd.similarity import unit_rows

CELLS = ("sru", "gru")
POOLS = ("attention", "mean")
EPS = 1e-12  # in the square of an embedding's length
# The scorers' weights are [outputs, inputs].
_scorer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)


class Embedded(NamedTuple):
    """What one of the two encoders makes of its inputs.

    Attributes:
      vector: [batch, dim], of unit length; float32 at least.
      attention: [batch, heads, positions], float32 at least; sums to 1 over positions.
      features: by name, "positions" [batch, positions, width]: what the heads choose from; "heads" [batch, heads,
        width]: what each makes of it; "projected" [batch, dim]: the vector before it is normalized; "map" of an image
        encoder with a backbone, what that gave.
    """

    vector: Float[Array, "batch dim"]
    attention: Float[Array, "batch heads positions"]
    features: dict[str, Float[Array, "batch ..."]]


class MatchedPairs(NamedTuple):
    """Images and texts in one space; row i of both is a pair."""

    image: Embedded
    text: Embedded


class MultiHeadAttentionPool(nn.Module):
    """`multi_head_pool` with its weights: one scorer of `hidden` units, `heads` weighted means.

    Attributes:
      heads: R.
      hidden: units of the scorer.
      act: "relu" or "tanh".
      dropout: of what the scorer sees; the means are of the features themselves.
      dtype: of the computation and the means; the weights over positions are float32 at least.
      param_dtype: of the parameters w1 [hidden, dim] and w2 [heads, hidden].

    Reference: Park et al., MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020.
    """

    heads: int = 10
    hidden: int = 350
    act: str = "relu"
    dropout: float = 0.5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        feats: Float[Tensor, "batch positions dim"],
        mask: Bool[Tensor, "batch positions"] | None = None,
        train: bool = False,
    ) -> Pooled:
        """Means [batch, heads, dim] and weights [batch, heads, positions].

        Raises:
          UserError: as `multi_head_pool`, or for fewer than one head or hidden unit.
        """
        check_sizes(heads=self.heads, hidden=self.hidden)
        w1 = self.param("w1", _scorer, (self.hidden, feats.shape[-1]), self.param_dtype)
        w2 = self.param("w2", _scorer, (self.heads, self.hidden), self.param_dtype)
        feats = jnp.asarray(feats, self.dtype)
        scored = nn.Dropout(self.dropout, deterministic=not train)(feats)
        return multi_head_pool(feats, w1, w2, mask, self.act, scored=scored)


class _Head(nn.Module):
    """From positions to a vector of unit length: attention or a mean, concatenation, dropout, projection."""

    dim: int
    heads: int
    hidden: int
    act: str
    pool: str
    dropout: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, positions: Array, mask: Array | None, train: bool) -> Embedded:
        check_sizes(dim=self.dim, heads=self.heads)
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        types: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.pool == "attention":
            pool = MultiHeadAttentionPool(self.heads, self.hidden, self.act, self.dropout, **types, name="pool")
            pooled, attention = pool(positions, mask, train)
        else:
            pooled, attention = _mean_pool(positions, mask, self.heads)
        joined = pooled.reshape(pooled.shape[0], -1)
        joined = nn.Dropout(self.dropout, deterministic=not train)(joined)
        projection = linear(joined.shape[-1], self.dim, self.dtype, self.param_dtype, "projection")
        projected = projection(joined).astype(at_least_float32(self.dtype))
        projected = checkpoint_name(projected, "logits")
        features = {"positions": positions, "heads": pooled, "projected": projected}
        return Embedded(unit_rows(projected, eps=EPS), attention, features)


def _mean_pool(positions: Array, mask: Array | None, heads: int) -> Pooled:
    """Heads that look everywhere alike."""
    scores = jnp.zeros((positions.shape[0], heads, positions.shape[1]), at_least_float32(positions.dtype))
    attention = masked_softmax(scores, mask)
    known = positions if mask is None else jnp.where(mask[..., None], positions, 0)
    return Pooled(jnp.einsum("brp,bpd->brd", attention.astype(positions.dtype), known), attention)


class ImageEncoder(nn.Module):
    """Images, or feature maps of them, to vectors of unit length.

        E = a 1x1 convolution of the map;    v = W [head_1; ..; head_R] + b, over its length

    Nothing depends on the number of positions: images of another size, or maps, need no other parameters. Dropout draws
    from the stream "dropout".

    Attributes:
      dim: D, of the vectors.
      width: of the positions; None: `dim`, as the authors have it.
      heads: R.
      hidden: units of the scorer.
      act: of the scorer.
      pool: "attention", or "mean": uniform weights.
      dropout: of what the scorer sees, and of the joined heads.
      backbone: a network of `jkd.nn`, or None where the inputs are maps already.
      tap: the backbone's feature that the heads choose from.
      train_statistics: whether the backbone's normalization takes the statistics of training batches; otherwise its
        running ones, as suits a pretrained one.
      dtype: of the computation; weights over positions and vectors are float32 at least.
      param_dtype: of the parameters.
    """

    dim: int = 2400
    width: int | None = None
    heads: int = 10
    hidden: int = 350
    act: str = "relu"
    pool: str = "attention"
    dropout: float = 0.5
    backbone: nn.Module | None = None
    tap: str = "block4"
    train_statistics: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Num[Tensor, "batch ..."], train: bool = False) -> Embedded:
        """Maps images [B, H, W, C], or feature maps [B, h, w, C] or [B, positions, C], to vectors [B, dim].

        Raises:
          UserError: if the inputs have another rank, are not floating point, or the backbone has no such feature.
        """
        images, found = jnp.asarray(images), {}
        if self.backbone is not None:
            images = found["map"] = self._map(images, train)
        if images.ndim not in (3, 4) or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                "images must be floating point maps [batch, h, w, channels] or [batch, positions, channels], got "
                f"{images.dtype} {list(images.shape)}."
            )
        flat = images.reshape(images.shape[0], -1, images.shape[-1]).astype(self.dtype)
        width = self.dim if self.width is None else self.width
        check_sizes(dim=self.dim, width=width)
        # A 1x1 convolution.
        positions = linear(flat.shape[-1], width, self.dtype, self.param_dtype, "positions")(flat)
        head = _Head(**_fields(self), name="head")
        out = head(keep(positions.astype(self.dtype)), None, train)
        return out._replace(features=found | out.features)

    def _map(self, images: Array, train: bool) -> Array:
        out = self.backbone(images, train=train and self.train_statistics)  # type: ignore[misc]
        if self.tap not in out.features:
            raise unknown("tap", self.tap, out.features)
        return out.features[self.tap]


class TextEncoder(nn.Module):
    """Texts to vectors of unit length: a recurrent network over word vectors, then heads over its outputs.

    Words are vectors [batch, time, word_dim], or numbers int[batch, time] of a table that is learned. Dropout draws
    from the stream "dropout".

    Attributes:
      dim: D, of the vectors.
      width: of the recurrent network; None: `dim`, as the authors have it.
      heads: R.
      hidden: units of the scorer.
      act: of the scorer.
      pool: "attention", or "mean": uniform weights over the words.
      dropout: of what the scorer sees, and of the joined heads.
      cell: "sru" or "gru".
      layers: of the recurrent network.
      peephole: of the SRU, see `SRULayer`.
      cell_dropout: between the layers, and of an SRU's inputs.
      vocabulary: of the learned table; 0: words are vectors.
      word_dim: of the learned table's vectors.
      dtype: of the computation; weights over words, vectors and recurrences are float32 at least.
      param_dtype: of the parameters.
    """

    dim: int = 2400
    width: int | None = None
    heads: int = 10
    hidden: int = 350
    act: str = "tanh"
    pool: str = "attention"
    dropout: float = 0.5
    cell: str = "sru"
    layers: int = 4
    peephole: bool = True
    cell_dropout: float = 0.25
    vocabulary: int = 0
    word_dim: int = 620
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, words: Num[Tensor, "batch time *dim"], mask: Bool[Tensor, "batch time"], train: bool = False
    ) -> Embedded:
        """Maps words and their mask (False for padding) to vectors [B, dim].

        Raises:
          UserError: if words are not as above, a text is known to be empty, or a field is out of range.
        """
        words, mask = jnp.asarray(words), jnp.asarray(mask)
        if words.shape[:2] != mask.shape or not mask.shape[1]:
            raise UserError(
                f"words and mask must be of the same texts and words, got {list(words.shape)} and {list(mask.shape)}."
            )
        check_some(mask)
        width = self.dim if self.width is None else self.width
        check_sizes(dim=self.dim, width=width)
        vectors = jnp.where(mask[..., None], self._vectors(words), 0)
        positions = keep(self._cell(width)(vectors, mask, train))
        return _Head(**_fields(self), name="head")(positions, mask, train)

    def _vectors(self, words: Array) -> Array:
        if jnp.issubdtype(words.dtype, jnp.floating):
            if words.ndim != 3:
                raise UserError(f"words must be vectors [batch, time, dim], got {list(words.shape)}.")
            return words.astype(self.dtype)
        if not self.vocabulary or words.ndim != 2:
            raise UserError(
                f"words are numbers [batch, time] where vocabulary > 0, and vectors [batch, time, dim] else; got "
                f"{words.dtype} {list(words.shape)} and vocabulary={self.vocabulary}."
            )
        # Gathered in the table's own dtype, so that its gradients are summed in it.
        table = nn.Embed(self.vocabulary, self.word_dim, param_dtype=self.param_dtype, name="words")
        return table(words).astype(self.dtype)

    def _cell(self, width: int) -> nn.Module:
        if self.cell not in CELLS:
            raise unknown("cell", self.cell, CELLS)
        types: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": self.cell}
        if self.cell == "gru":
            return GRU(width, self.layers, self.cell_dropout, **types)
        return SRU(width, self.layers, self.peephole, self.cell_dropout, self.cell_dropout, **types)


class MHSAN(nn.Module):
    """Both encoders: images and texts to unit vectors of one space, whose cosines say what belongs together.

    Attributes:
      image: an `ImageEncoder`.
      text: a `TextEncoder` with the same `dim`.

    Reference: Park et al., MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020.
    """

    image: ImageEncoder
    text: TextEncoder

    def __call__(
        self,
        images: Num[Tensor, "batch ..."],
        words: Num[Tensor, "batch time *dim"],
        mask: Bool[Tensor, "batch time"],
        train: bool = False,
    ) -> MatchedPairs:
        """Embeds pairs; see the encoders."""
        if self.image.dim != self.text.dim:
            raise UserError(f"Both encoders need one dim, got {self.image.dim} and {self.text.dim}.")
        return MatchedPairs(self.encode_image(images, train), self.encode_text(words, mask, train))

    def encode_image(self, images: Num[Tensor, "batch ..."], train: bool = False) -> Embedded:
        """Embeds images alone: `model.apply(variables, images, method="encode_image")`."""
        return self.image(images, train)

    def encode_text(
        self, words: Num[Tensor, "batch time *dim"], mask: Bool[Tensor, "batch time"], train: bool = False
    ) -> Embedded:
        """Embeds texts alone: `model.apply(variables, words, mask, method="encode_text")`."""
        return self.text(words, mask, train)


def _fields(encoder: ImageEncoder | TextEncoder) -> dict[str, Any]:
    names = ("dim", "heads", "hidden", "act", "pool", "dropout", "dtype", "param_dtype")
    return {name: getattr(encoder, name) for name in names}


def check_sizes(**sizes: int) -> None:
    """Raises UserError unless every size is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, got {size}.")
