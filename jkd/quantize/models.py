"""Flax layers with low-bit weights and activations, and low-bit activations of any linen model, left as it is.

Weights of whole models are quantized by `transform`, activations here, around the model's `apply`:

    apply_fn = quantize.low_bit_activations(model.apply, 2)
    variables |= {"quant_stats": quantize.activation_stats(model.apply, variables, image_shape, 2)}
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
from jkd.nn import mixed
from jkd.nn.apply import ApplyFn, Variables
from jkd.quantize.activations import MODES, fit_basis, follow_activations, quantize_activation
from jkd.quantize.direct import direct_quantize, init_assignment
from jkd.quantize.levels import activation_basis, check_bits, levels_from_basis, weight_basis
from jkd.quantize.transform import ENDS, Rules, bits_of, check_rules

COLLECTION = "quant_stats"


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
        _check(self.mode, self.momentum)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"], train: bool) -> Float[Array, "*batch channels"]:
        """Returns the activations as levels, in at least float32."""
        basis = self.variable(COLLECTION, "basis", lambda: jnp.asarray(activation_basis(self.bits)))
        quantized = quantize_activation(x, basis.value)
        if train and not self.is_initializing():
            basis.value = follow_activations(x, basis.value, self.mode, self.momentum)
        return quantized


# --- any linen model ---

LAYERS = (nn.Conv, nn.Dense, DirectQuantConv, DirectQuantDense)


def low_bit_activations(
    apply_fn: ApplyFn, bits: int, *, mode: str = "variance", momentum: float = 0.9, rules: Rules = ENDS
) -> ApplyFn:
    """`apply_fn` of a linen model with low-bit inputs of its convolutions and dense layers.

    Each such layer has a basis under "quant_stats", made by `activation_stats`. In training, where that collection is
    mutable, it moves by `1 - momentum` towards the batch's own after it was used, and comes back with the new state as
    "batch_stats" do (`jkd.nn.apply_train` works as it is); else it stays. Statistics are over the global batch.

    Inputs should be >= 0, as after a ReLU: negative ones become the lowest level, 0. Give rules for layers whose
    inputs are not, such as linear bottlenecks.

    Args:
      apply_fn: `model.apply`, or a function that calls it, not jitted: wrap first, then jit. It takes `train`.
      bits: of each activation, 1..8.
      mode: how channels are weighted, see `channel_weights`.
      momentum: in [0, 1).
      rules: (regex, bits) on the paths of the layers' kernels, as in `quantize_params`; by default the inputs of
        "stem" and "head" stay as they are.

    Raises:
      UserError: if an argument is not as above; when called, if a layer has no basis or one of other bits, or no layer
        is quantized.

    Reference: the basis and its moving average are those of Zhang et al., LQ-Nets, ECCV 2018.
    """
    check_rules(bits, rules)
    _check(mode, momentum)

    def apply(variables: Variables, *args: Any, train: bool = False, **options: Any) -> Any:
        def change(layer: nn.Module, path: str, x: Array) -> Array:
            basis = _stored(layer, path, bits_of(path, bits, rules))
            if train and layer.is_mutable_collection(COLLECTION):
                layer.put_variable(COLLECTION, "basis", follow_activations(x, basis, mode, momentum))
            return quantize_activation(x, basis).astype(x.dtype)

        run = _with_inputs(apply_fn, change, lambda layer, path: bits_of(path, bits, rules) > 0)
        return run(variables, *args, train=train, **options)

    return apply


def activation_stats(
    apply_fn: ApplyFn, variables: Variables, images: Any, bits: int, *, rules: Rules = ENDS
) -> dict[str, Any]:
    """The collection "quant_stats" that `low_bit_activations` starts from: `activation_basis` at each layer.

    Args:
      apply_fn: the model's own, as given to `low_bit_activations`.
      variables: the model's, in full precision; shapes are enough.
      images: a batch, or the shape of one image, such as (32, 32, 3).
      bits: as there.
      rules: as there.

    Raises:
      UserError: if an argument is not as there, or no layer is quantized.
    """
    check_rules(bits, rules)
    found: dict[str, Any] = {}

    def change(layer: nn.Module, path: str, x: Array) -> Array:
        place = found
        for name in layer.path:
            place = place.setdefault(name, {})
        place["basis"] = activation_basis(bits_of(path, bits, rules))
        return x

    batch = jax.ShapeDtypeStruct((1, *images), jnp.float32) if isinstance(images, tuple) else images
    run = _with_inputs(apply_fn, change, lambda layer, path: bits_of(path, bits, rules) > 0)
    jax.eval_shape(lambda variables, x: run(variables, x, train=False), variables, batch)
    return jax.tree.map(jnp.asarray, found)


def calibrate(
    apply_fn: ApplyFn, variables: Variables, images: Any, *, mode: str = "variance", iterations: int = 50
) -> dict[str, Any]:
    """`variables` whose bases are those of least squares on a batch: low-bit activations without training.

    One forward pass in evaluation mode: each layer's basis is fitted (`fit_basis`) to what reaches it through the
    low-bit layers before it. Traceable.

    Args:
      apply_fn: the model's own, as given to `low_bit_activations`; it is passed `mutable`.
      variables: with "quant_stats" of `activation_stats`, which say what layers have how many bits.
      images: [batch, ...]; more images give better bases and take more memory.
      mode: how channels are weighted, see `channel_weights`.
      iterations: of least squares at each layer.

    Raises:
      UserError: if the mode is unknown, or no layer has a basis.
    """
    _check(mode, 0.0)

    def change(layer: nn.Module, path: str, x: Array) -> Array:
        basis = fit_basis(x, layer.get_variable(COLLECTION, "basis").size, mode, iterations=iterations)
        layer.put_variable(COLLECTION, "basis", basis)
        return quantize_activation(x, basis).astype(x.dtype)

    run = _with_inputs(apply_fn, change, lambda layer, path: layer.has_variable(COLLECTION, "basis"))
    _, found = run(variables, images, train=False, mutable=[COLLECTION])
    return {**variables, COLLECTION: found[COLLECTION]}


def _with_inputs(
    apply_fn: ApplyFn, change: Callable[[nn.Module, str, Array], Array], taken: Callable[[nn.Module, str], bool]
) -> ApplyFn:
    """`apply_fn` with `change(layer, path of its kernel, inputs)` as the inputs of the layers that are taken."""

    def apply(*given: Any, **settings: Any) -> Any:
        seen: list[str] = []

        def intercept(call: Callable, args: tuple, options: Mapping[str, Any], context: Any) -> Any:
            layer, path = context.module, "/".join((*(context.module.path or ()), "kernel"))
            if context.method_name != "__call__" or not isinstance(layer, LAYERS) or not taken(layer, path):
                return call(*args, **options)
            seen.append(path)
            inputs, *others = (*args, *options.values())
            return call(change(layer, path, jnp.asarray(inputs)), *others)

        with nn.intercept_methods(intercept):
            out = apply_fn(*given, **settings)
        if not seen:
            raise UserError(
                "No layer has low-bit activations: apply_fn must call a linen model (and not be jitted before it is "
                "wrapped), with convolutions or dense layers that the rules do not leave out."
            )
        return out

    return apply


def _stored(layer: nn.Module, path: str, bits: int) -> Array:
    if not layer.has_variable(COLLECTION, "basis"):
        raise UserError(f'variables["{COLLECTION}"] hold no basis for the inputs of {path}: activation_stats makes it.')
    basis = jnp.asarray(layer.get_variable(COLLECTION, "basis"))
    if basis.shape != (bits,):
        raise UserError(f"The basis for the inputs of {path} must have {bits} bits, got the shape {list(basis.shape)}.")
    return basis


def _check(mode: str, momentum: float) -> None:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), got {momentum}.")
