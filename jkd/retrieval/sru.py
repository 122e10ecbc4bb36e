"""Simple recurrent units: recurrences whose matrix products do not depend on the state."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jkd.checks import Tensor
from jkd.errors import UserError
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32

# U(-sqrt(3 / fan_in), sqrt(3 / fan_in)), as the units' authors start their products.
unit_variance = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
Sequence = Float[Tensor, "batch time dim"]
Mask = Bool[Tensor, "batch time"]


def gated_average(
    candidate: Float[Tensor, "batch time state"],
    forget: Float[Tensor, "batch time state"],
    peephole: Float[Tensor, " state"] | None,
    mask: Mask,
) -> Float[Array, "batch states state"]:
    """The states of an SRU before each word, and after the last: c_0 = 0, c_t = f_t c_(t-1) + (1 - f_t) u_t.

    f_t = sigmoid(a_t + v c_(t-1)); masked words leave the state as it is. Elementwise, in the dtype of `candidate`:
    give float32. Without `peephole` f_t does not depend on the state, and all states come from one associative scan.

    Args:
      candidate: u.
      forget: a.
      peephole: v; None: 0.
      mask: False for padding.

    Returns:
      [batch, time + 1, dim].
    """
    candidate, forget, keep = jnp.asarray(candidate), jnp.asarray(forget), jnp.asarray(mask)[:, :, None]
    start = jnp.zeros_like(candidate[:, :1])
    if peephole is None:
        # Affine maps c -> a c + b; one after the other is another.
        scale = jnp.where(keep, jax.nn.sigmoid(forget), 1)
        shift = jnp.where(keep, (1 - scale) * candidate, 0)

        def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
            return first[0] * second[0], second[0] * first[1] + second[1]

        states = jax.lax.associative_scan(then, (scale, shift), axis=1)[1]
        return jnp.concatenate([start, states], 1)

    def step(state: Array, word: tuple[Array, ...]) -> tuple[Array, Array]:
        u, a, kept = word
        f = jax.nn.sigmoid(a + peephole[None] * state)
        state = jnp.where(kept, f * state + (1 - f) * u, state)
        return state, state

    words = tuple(jnp.swapaxes(x, 0, 1) for x in (candidate, forget, keep))
    _, states = jax.lax.scan(step, start[:, 0], words)
    return jnp.concatenate([start, jnp.swapaxes(states, 0, 1)], 1)


class SRULayer(nn.Module):
    """One layer of simple recurrent units.

        u_t = W x_t,  f_t = sigmoid(W_f x_t + v_f c_(t-1) + b_f),  r_t = sigmoid(W_r x_t + v_r c_(t-1) + b_r)
        c_t = f_t c_(t-1) + (1 - f_t) u_t,    h_t = r_t tanh(c_t) + (1 - r_t) x'_t

    x' is x, or W_x x where x has another size. All products are one, before the recurrence, in `dtype`; the recurrence
    is float32 at least. Words before and after padding do not notice it.

    Attributes:
      features: of the state and the output.
      peephole: whether the gates see the state (v_f, v_r); without, time steps are computed in parallel.
      dropout: share of the inputs that the products do not see, the same at all times.
      dtype: of the products and the output.
      param_dtype: of the parameters.

    Reference: Lei et al., Simple Recurrent Units for Highly Parallelizable Recurrence, EMNLP 2018.
    """

    features: int
    peephole: bool = True
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Sequence, mask: Mask, train: bool = False) -> Float[Array, "batch time features"]:
        """Outputs [batch, time, features] in `dtype`; what they are at masked words says nothing."""
        wide, same = at_least_float32(self.dtype), x.shape[-1] == self.features
        x, mask = jnp.asarray(x, self.dtype), jnp.asarray(mask)
        seen = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not train)(x)
        products = self._dense(self.features * (3 if same else 4), "products")(seen).astype(wide)
        u, forget, reset, *other = jnp.split(products, 3 if same else 4, axis=-1)
        bias = self.param("bias", nn.initializers.zeros, (2, self.features), self.param_dtype).astype(wide)
        forget, reset = forget + bias[0][None, None], reset + bias[1][None, None]
        gates = None
        if self.peephole:
            gates = self.param("peephole", nn.initializers.zeros, (2, self.features), self.param_dtype).astype(wide)
        states = gated_average(u, forget, None if gates is None else gates[0], mask)
        before, after = states[:, :-1], states[:, 1:]
        if gates is not None:
            reset = reset + gates[1][None, None] * before
        r, highway = jax.nn.sigmoid(reset), x.astype(wide) if same else other[0]
        return (r * jnp.tanh(after) + (1 - r) * highway).astype(self.dtype)

    def _dense(self, units: int, name: str) -> nn.Dense:
        return nn.Dense(
            units,
            use_bias=False,
            kernel_init=unit_variance,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=mixed.promote,
            dot_general=mixed.dot_general,
            name=name,
        )


class SRU(nn.Module):
    """Layers of `SRULayer`, one on the other, from the first word to the last.

    Attributes:
      features: of every layer.
      layers: how many, at least 1.
      peephole: of the layers.
      dropout: between the layers, the same at all times.
      recurrent_dropout: of the layers' inputs, see `SRULayer`.
      dtype: of the products and the output.
      param_dtype: of the parameters.
    """

    features: int
    layers: int = 4
    peephole: bool = True
    dropout: float = 0.25
    recurrent_dropout: float = 0.25
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Sequence, mask: Mask, train: bool = False) -> Float[Array, "batch time features"]:
        """Outputs [batch, time, features] in `dtype`.

        Raises:
          UserError: without a layer.
        """
        check_layers(self.layers)
        x, mask = jnp.asarray(x), jnp.asarray(mask)
        types: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for k in range(self.layers):
            if k:
                x = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not train)(x)
            layer = SRULayer(self.features, self.peephole, self.recurrent_dropout, **types, name=f"layer{k + 1}")
            x = layer(x, mask, train)
        return x


class _MaskedGRUCell(nn.Module):
    """A GRU cell that masked words leave as it is."""

    features: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, state: Array, word: Any) -> tuple[Array, Array]:
        x, kept = word
        cell = nn.GRUCell(self.features, dtype=state.dtype, param_dtype=self.param_dtype, name="cell")
        state = jnp.where(kept, cell(state, x)[0], state)
        return state, state


class GRU(nn.Module):
    """Layers of gated recurrent units in the place of an `SRU`; all of it in float32 at least.

    Attributes:
      features: of every layer.
      layers: how many, at least 1.
      dropout: between the layers, the same at all times.
      dtype: of the output.
      param_dtype: of the parameters.
    """

    features: int
    layers: int = 1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Sequence, mask: Mask, train: bool = False) -> Float[Array, "batch time features"]:
        """Outputs [batch, time, features] in `dtype`.

        Raises:
          UserError: without a layer.
        """
        check_layers(self.layers)
        x, mask = jnp.asarray(x), jnp.asarray(mask)
        x = x.astype(at_least_float32(self.dtype))
        over_time = nn.scan(
            _MaskedGRUCell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        for k in range(self.layers):
            if k:
                x = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not train)(x)
            start = jnp.zeros((x.shape[0], self.features), x.dtype)
            _, x = over_time(self.features, self.param_dtype, name=f"layer{k + 1}")(start, (x, mask[:, :, None]))
        return x.astype(self.dtype)


def check_layers(layers: int) -> None:
    """Raises UserError unless there is a layer."""
    if layers < 1:
        raise UserError(f"layers must be at least 1, got {layers}.")
