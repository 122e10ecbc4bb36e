"""Attention over the positions of feature maps [batch, height, width, channels], for generators and discriminators."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32

SOURCES = ("primary", "reference")
Maps = Float[Array, "batch height width channels"]


def dot_attention(
    query: Float[Array, "batch queries dim"],
    key: Float[Array, "batch keys dim"],
    value: Float[Array, "batch keys channels"],
    *,
    scale: bool = False,
) -> Float[Array, "batch queries channels"]:
    """Each query's mean of the values, weighted by how well their keys match it.

        out_i = sum_j A_ij v_j,    A_i = softmax_j(q_i . k_j)    (q_i . k_j / sqrt(dim) where `scale`)

    Products in the dtypes given, the softmax in float32 at least; memory is that of A, [batch, queries, keys].
    """
    scores = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=at_least_float32(query.dtype))
    if scale:
        scores = scores / jnp.sqrt(jnp.asarray(query.shape[-1], scores.dtype))
    return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores).astype(value.dtype), value)


def project(layer: Any, features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
    """A 1x1 convolution in the dtypes of a block (call in its compact method)."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        promote_dtype=mixed.promote,
        dot_general=mixed.dot_general,
        name=name,
    )


def check_maps(name: str, x: Array) -> None:
    """Stops what is no floating point [batch, height, width, channels].

    Raises:
      UserError: if so.
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"{name} must be floating point [batch, height, width, channels], got {x.dtype} {list(x.shape)}."
        )


def check_positive(**sizes: int) -> None:
    """Stops sizes below 1.

    Raises:
      UserError: with the name of the first of them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, got {size}.")


def _attend(layer: "SelfAttention2D | ReferenceAttention", query: Maps, key: Maps, value: Maps, residual: Maps) -> Maps:
    """The block of one compact method: projections, attention over all positions, and the gated residual."""
    check_positive(features=layer.features, qk_dim=layer.qk_dim)

    def rows(x: Maps, features: int, name: str) -> Array:
        return project(layer, features, name)(x).reshape(x.shape[0], -1, features)

    queries, keys = rows(query, layer.qk_dim, "query"), rows(key, layer.qk_dim, "key")
    out = dot_attention(queries, keys, rows(value, layer.features, "value"), scale=layer.scale)
    out = project(layer, residual.shape[-1], "out")(out).reshape(residual.shape)
    gamma = layer.param("gamma", nn.initializers.zeros, (), layer.param_dtype)
    return residual.astype(layer.dtype) + gamma.astype(layer.dtype) * out.astype(layer.dtype)


class SelfAttention2D(nn.Module):
    """Every position attends to all others: x + gamma W_o attention(W_q x, W_k x, W_v x), gamma = 0 at first.

    Without biases. The scores are not divided by sqrt(qk_dim) unless `scale`, as in the paper; large ones saturate the
    softmax, which unsettles a discriminator. Memory is (height width)^2 numbers an image.

    Attributes:
      features: channels of the values (the paper's implementations take all or half of the input's).
      qk_dim: channels of queries and keys (the paper: an eighth of the input's).
      scale: whether the scores are divided by sqrt(qk_dim).
      dtype: of the computation and the output; the softmax is in float32 at least.
      param_dtype: of the parameters.

    Reference: Zhang, Goodfellow, Metaxas and Odena, Self-Attention Generative Adversarial Networks, ICML 2019.
    """

    features: int
    qk_dim: int
    scale: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps [batch, height, width, channels] to the same shape, in `dtype`.

        Raises:
          UserError: for other maps, or attributes that do not fit them.
        """
        check_maps("x", x)
        return _attend(self, x, x, x, x)


class ReferenceAttention(nn.Module):
    """Attention whose weights come from a reference image and whose values come from the primary one.

        x_primary + gamma W_o attention(W_q x_reference, W_k x_reference, W_v x_primary),    gamma = 0 at first

    With the same maps twice it is `SelfAttention2D`, parameters included. For a discriminator: both maps come from the
    same layers, the reference image is real and drawn independently of the primary one (real or fake), and what follows
    sees the result. The three sources can be chosen, because the paper's text alone does not fix them.

    Attributes:
      features: channels of the values.
      qk_dim: channels of queries and keys.
      scale: whether the scores are divided by sqrt(qk_dim).
      query_from: "primary" or "reference".
      key_from: "primary" or "reference".
      value_from: "primary" or "reference".
      dtype: of the computation and the output; the softmax is in float32 at least.
      param_dtype: of the parameters.

    Reference: Yu et al., Dual Contrastive Loss and Attention for GANs, ICCV 2021.
    """

    features: int
    qk_dim: int
    scale: bool = False
    query_from: str = "reference"
    key_from: str = "reference"
    value_from: str = "primary"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_primary: Maps, x_reference: Maps) -> Maps:
        """Maps two [batch, height, width, channels] to one, in `dtype`.

        Raises:
          UserError: for other maps, or attributes that do not fit them.
        """
        check_maps("x_primary", x_primary)
        if x_primary.shape != x_reference.shape:
            raise UserError(
                "x_primary and x_reference must have the same shape, got "
                f"{list(x_primary.shape)} and {list(x_reference.shape)}."
            )
        maps = {"primary": x_primary, "reference": x_reference}
        for source in (self.query_from, self.key_from, self.value_from):
            if source not in SOURCES:
                raise unknown("source", source, SOURCES)
        return _attend(self, maps[self.query_from], maps[self.key_from], maps[self.value_from], x_primary)


class _TokenRound(nn.Module):
    """One round of `TokenAttention`: pools tokens, lets them attend to each other, and gives them back."""

    tokens: int
    qk_dim: int
    scale: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, rows: Float[Array, "batch positions channels"], before: Float[Array, "batch tokens channels"] | None
    ) -> tuple[Float[Array, "batch positions channels"], Float[Array, "batch tokens channels"]]:
        """Rows and tokens after the round; `before` are the last round's tokens."""
        batch, _, channels = rows.shape
        if before is None:
            start = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
            groups = self.param("groups", start, (self.tokens, channels), self.param_dtype)
            asked = jnp.broadcast_to(groups.astype(self.dtype), (batch, self.tokens, channels))
        else:
            asked = project(self, channels, "groups")(before)
        tokens = dot_attention(asked, rows, rows, scale=self.scale)
        query, key = (project(self, self.qk_dim, f"token_{name}")(tokens) for name in ("query", "key"))
        tokens = tokens + dot_attention(query, key, tokens, scale=self.scale)
        units = nn.relu(project(self, channels, "token_hidden", use_bias=True)(tokens))
        tokens = tokens + project(self, channels, "token_out", use_bias=True)(units.astype(self.dtype))
        tokens = tokens.astype(self.dtype)
        query, key = project(self, self.qk_dim, "query")(rows), project(self, self.qk_dim, "key")(tokens)
        return rows + dot_attention(query, key, tokens, scale=self.scale), tokens


class TokenAttention(nn.Module):
    """Positions attend to a few tokens, pooled from all of them, that attend to each other: a visual transformer.

        T = softmax_positions(x W_A)^T x,    in later rounds W_A = (T W_R)^T of the last round's tokens
        T = T + softmax_tokens((T W_k)(T W_q)^T) T,    T = T + relu(T W_1 + b_1) W_2 + b_2
        x = x + softmax_tokens((x W_Q)(T W_K)^T) T

    Memory is height width tokens numbers an image, where `SelfAttention2D` takes (height width)^2. Tokens have
    the maps' channels, and there is neither dropout nor normalization.

    Attributes:
      tokens: how many.
      rounds: how often this is done, with weights of their own.
      qk_dim: channels of queries and keys; by default half of the input's, at least 1.
      scale: whether scores are divided by the root of their number of channels.
      dtype: of the computation and the output; the softmax is in float32 at least.
      param_dtype: of the parameters.

    Reference: Wu et al., Visual Transformers: Token-based Image Representation and Processing for Computer Vision, 2020
      (filter-based and recurrent tokenizers).
    """

    tokens: int = 16
    rounds: int = 1
    qk_dim: int | None = None
    scale: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps [batch, height, width, channels] to the same shape, in `dtype`.

        Raises:
          UserError: for other maps, or attributes that do not fit them.
        """
        check_maps("x", x)
        channels = x.shape[-1]
        qk_dim = max(channels // 2, 1) if self.qk_dim is None else self.qk_dim
        check_positive(tokens=self.tokens, rounds=self.rounds, qk_dim=qk_dim)
        rows, tokens = x.reshape(len(x), -1, channels).astype(self.dtype), None
        for i in range(self.rounds):
            one = _TokenRound(self.tokens, qk_dim, self.scale, self.dtype, self.param_dtype, name=f"round{i + 1}")
            rows, tokens = one(rows, tokens)
        return rows.reshape(x.shape)
