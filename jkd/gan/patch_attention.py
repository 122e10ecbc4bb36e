"""Attention to the square around each position of feature maps [batch, height, width, channels]."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jkd.errors import UserError
from jkd.gan.attention import Maps, check_maps, check_positive, project
from jkd.nn.layers import at_least_float32, conv, uniform_fan_in


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


def _check_patches(layer: "PatchwiseSelfAttention | DynamicFilter", x: Maps) -> int:
    """The number of groups of channels that share their weights; stops sizes that do not fit."""
    check_maps("x", x)
    check_positive(kernel_size=layer.kernel_size, share_planes=layer.share_planes)
    if layer.kernel_size % 2 == 0 or x.shape[-1] % layer.share_planes:
        raise UserError(
            f"kernel_size must be odd and share_planes must divide the {x.shape[-1]} channels, got "
            f"{layer.kernel_size} and {layer.share_planes}."
        )
    return x.shape[-1] // layer.share_planes


def _softmax_inside(
    scores: Float[Array, "batch height width patch groups"], size: int
) -> Float[Array, "batch height width patch groups"]:
    """Weights that sum to 1 over the part of each position's patch that lies in the map."""
    inside = _neighborhoods(jnp.ones((1, *scores.shape[1:3], 1), bool), size)
    return jax.nn.softmax(scores, axis=3, where=jnp.broadcast_to(inside, scores.shape))


def _add_patches(
    layer: "PatchwiseSelfAttention | DynamicFilter", x: Maps, weights: Float[Array, "batch height width patch groups"]
) -> Maps:
    """The maps and each patch's weighted sum of values (call in a compact method)."""
    *where, channels = x.shape
    values = project(layer, channels, "value")(x)
    # Groups, of which there are many, come last: accelerators fill the last axis up to 128.
    grouped = values.reshape(*where, layer.share_planes, -1)
    out = _sum_of_patches(weights.astype(grouped.dtype), grouped, layer.kernel_size).reshape(*where, channels)
    return x.astype(layer.dtype) + out.astype(layer.dtype)


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
        """Maps [batch, height, width, channels] to the same shape, in `dtype`.

        Raises:
          UserError: for other maps, or attributes that do not fit them.
        """
        groups = _check_patches(self, x)
        return _add_patches(self, x, _softmax_inside(self._scores(x, groups), self.kernel_size))

    def _scores(self, x: Maps, groups: int) -> Float[Array, "batch height width patch groups"]:
        """How well each position of a patch suits the one in its middle."""
        *where, channels = x.shape
        qk_dim = max(channels // 8, 1) if self.qk_dim is None else self.qk_dim
        hidden = groups if self.hidden is None else self.hidden
        check_positive(qk_dim=qk_dim, hidden=hidden)
        query, key = project(self, qk_dim, "query")(x), project(self, qk_dim, "key")(x)
        of_keys = conv(
            hidden,
            self.kernel_size,
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="mlp_keys",
        )(key)
        units = nn.relu(project(self, hidden, "mlp_query", use_bias=True)(query) + of_keys)
        scores = project(self, self.kernel_size**2 * groups, "mlp_out", use_bias=True)(units.astype(self.dtype))
        return scores.reshape(*where, -1, groups).astype(at_least_float32(self.dtype))


class DynamicFilter(nn.Module):
    """Every position is filtered by weights that a small network makes of what surrounds it.

        x_i + sum_(j in R(i)) f_ij * v_j,    f_i = softmax_R(i)( W_2 leaky_relu(conv(x)_i + b_1) + b_2 )

    The dynamic local filtering layer: other filters at every position of every image. They see a square of
    `context_size` around the position, not its whole patch. Groups are those of `PatchwiseSelfAttention`, and so are
    the edges: no weight outside the map.

    Attributes:
      kernel_size: of the filters, odd.
      share_planes: how many channels share their filters; divides the input's channels.
      context_size: of the convolution that filters are made by, odd.
      hidden: its channels; by default the input's.
      normalize: whether a filter's weights are positive and sum to 1; otherwise they are as the network makes them.
      dtype: of the computation and the output; the softmax is in float32 at least.
      param_dtype: of the parameters.

    Reference: De Brabandere, Jia, Tuytelaars and Van Gool, Dynamic Filter Networks, NeurIPS 2016 (whose filters move
      pixels of images; the projection v, the groups and the sum with x are those of a block among convolutions).
    """

    kernel_size: int = 7
    share_planes: int = 8
    context_size: int = 3
    hidden: int | None = None
    normalize: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps [batch, height, width, channels] to the same shape, in `dtype`.

        Raises:
          UserError: for other maps, or attributes that do not fit them.
        """
        groups = _check_patches(self, x)
        filters = self._filters(x, groups)
        return _add_patches(self, x, _softmax_inside(filters, self.kernel_size) if self.normalize else filters)

    def _filters(self, x: Maps, groups: int) -> Float[Array, "batch height width patch groups"]:
        """The filters of all positions as the network makes them."""
        *where, channels = x.shape
        hidden = channels if self.hidden is None else self.hidden
        check_positive(context_size=self.context_size, hidden=hidden)
        if self.context_size % 2 == 0:
            raise UserError(f"context_size must be odd, got {self.context_size}.")
        context = conv(
            hidden,
            self.context_size,
            use_bias=True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="context",
        )(x)
        units = nn.leaky_relu(context).astype(self.dtype)
        filters = project(self, self.kernel_size**2 * groups, "filters", use_bias=True)(units)
        return filters.reshape(*where, -1, groups).astype(at_least_float32(self.dtype))
