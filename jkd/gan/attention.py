"""Attention over the positions of feature maps [batch, height, width, channels], for generators and discriminators."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jkd.errors import UserError, unknown
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32, conv, uniform_fan_in

SOURCES = ("primary", "reference")
Maps = Float[Array, "batch height width channels"]
_Layer: TypeAlias = "SelfAttention2D | ReferenceAttention | PatchwiseSelfAttention"


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


def _project(layer: "_Layer", features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
    """A 1x1 convolution of `layer` (call in a compact method)."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        promote_dtype=mixed.promote,
        dot_general=mixed.dot_general,
        name=name,
    )


def _check_maps(name: str, x: Array) -> None:
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"{name} must be floating point [batch, height, width, channels], got {x.dtype} {list(x.shape)}."
        )


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} must be at least 1, got {size}.")


def _attend(layer: "SelfAttention2D | ReferenceAttention", query: Maps, key: Maps, value: Maps, residual: Maps) -> Maps:
    """The block of one compact method: projections, attention over all positions, and the gated residual."""
    _check_positive(features=layer.features, qk_dim=layer.qk_dim)

    def rows(x: Maps, features: int, name: str) -> Array:
        return _project(layer, features, name)(x).reshape(x.shape[0], -1, features)

    queries, keys = rows(query, layer.qk_dim, "query"), rows(key, layer.qk_dim, "key")
    out = dot_attention(queries, keys, rows(value, layer.features, "value"), scale=layer.scale)
    out = _project(layer, residual.shape[-1], "out")(out).reshape(residual.shape)
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
        """Maps [batch, height, width, channels] to the same shape, in `dtype`."""
        _check_maps("x", x)
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
        """Maps two [batch, height, width, channels] to one, in `dtype`."""
        _check_maps("x_primary", x_primary)
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


def _neighborhoods(x: Shaped[Array, "batch height width channels"], size: int) -> Array:
    """[batch, height, width, size * size, channels]: what lies around each position, row by row, 0 outside the map."""
    _, height, width, _ = x.shape
    half = size // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.stack(shifts, axis=3)


def _sum_of_patches(
    weights: Float[Array, "batch height width patch groups"],
    values: Float[Array, "batch height width planes groups"],
    size: int,
) -> Float[Array, "batch height width planes groups"]:
    """The sum over the square around each position of the values there, as they are weighted."""
    height, width, half = values.shape[1], values.shape[2], size // 2
    padded = jnp.pad(values, ((0, 0), (half, half), (half, half), (0, 0), (0, 0)))

    by_row = jnp.moveaxis(weights.reshape(*weights.shape[:3], size, size, -1), 3, 0)

    @jax.checkpoint
    def add_row(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        i, row_weights = row
        below = jax.lax.dynamic_slice_in_dim(padded, i, height, axis=1)
        around = jnp.stack([below[:, :, j : j + width] for j in range(size)], axis=3)
        return total + jnp.einsum("bhwpg,bhwpsg->bhwsg", row_weights, around), None

    # A loop: written out, all rows would be in memory at once.
    return jax.lax.scan(add_row, jnp.zeros_like(values), (jnp.arange(size), by_row))[0]


class PatchwiseSelfAttention(nn.Module):
    """Every position attends to the square around it, with weights that a small network makes of the whole patch.

        x_i + sum_(j in R(i)) w_ij * v_j,    w_i = softmax_R(i)( MLP([q_i; k_j for all j in R(i)]) )

    The weights depend on where in the patch a position lies, not on its content alone. With G = channels / share_planes
    groups, channel c has the weights of group c mod G. The MLP is 1x1, ReLU, 1x1; its first layer on the keys is a
    convolution with the patch as its kernel, so that only the values are unfolded, a row of the patch at a time, and
    anew in the backward pass: kernel_size channels numbers a position. Positions outside the map are zero for the MLP
    and have no weight in the softmax.

    Attributes:
      kernel_size: of the patch, odd.
      share_planes: how many channels share their weights; divides the input's channels.
      qk_dim: channels of queries and keys; by default an eighth of the input's, at least 1.
      hidden: units of the MLP; by default the number of groups.
      dtype: of the computation and the output; the softmax is in float32 at least.
      param_dtype: of the parameters.

    Reference: Zhao, Jia and Koltun, Exploring Self-attention for Image Recognition, CVPR 2020 (whose padding reflects,
      and whose MLP begins with batch normalization).
    """

    kernel_size: int = 7
    share_planes: int = 8
    qk_dim: int | None = None
    hidden: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps [batch, height, width, channels] to the same shape, in `dtype`."""
        _check_maps("x", x)
        _check_positive(kernel_size=self.kernel_size, share_planes=self.share_planes)
        *where, channels = x.shape
        if self.kernel_size % 2 == 0 or channels % self.share_planes:
            raise UserError(
                f"kernel_size must be odd and share_planes must divide the {channels} channels, got "
                f"{self.kernel_size} and {self.share_planes}."
            )
        values = _project(self, channels, "value")(x)
        # Groups, of which there are many, come last: accelerators fill the last axis up to 128.
        grouped = values.reshape(*where, self.share_planes, -1)
        weights = self._weights(x, channels // self.share_planes).astype(grouped.dtype)
        out = _sum_of_patches(weights, grouped, self.kernel_size).reshape(*where, channels)
        return x.astype(self.dtype) + out.astype(self.dtype)

    def _weights(self, x: Maps, groups: int) -> Float[Array, "batch height width patch groups"]:
        """The weights of each position's patch, which sum to 1 over the part of it that lies in the map."""
        batch, height, width, channels = x.shape
        qk_dim = max(channels // 8, 1) if self.qk_dim is None else self.qk_dim
        hidden = groups if self.hidden is None else self.hidden
        _check_positive(qk_dim=qk_dim, hidden=hidden)
        query, key = _project(self, qk_dim, "query")(x), _project(self, qk_dim, "key")(x)
        of_keys = conv(
            hidden,
            self.kernel_size,
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="mlp_keys",
        )(key)
        units = nn.relu(_project(self, hidden, "mlp_query", use_bias=True)(query) + of_keys)
        scores = _project(self, self.kernel_size**2 * groups, "mlp_out", use_bias=True)(units.astype(self.dtype))
        scores = scores.reshape(batch, height, width, -1, groups).astype(at_least_float32(self.dtype))
        inside = _neighborhoods(jnp.ones((1, height, width, 1), bool), self.kernel_size)
        return jax.nn.softmax(scores, axis=3, where=jnp.broadcast_to(inside, scores.shape))
