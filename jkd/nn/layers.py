"""Layers and checks that the classifiers share: PyTorch's paddings, initializers and defaults, in NHWC."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Num

from jkd.errors import UserError
from jkd.nn import mixed

Images = Num[Array | np.ndarray, "batch *image"]

# He et al., "Delving deep into rectifiers", ICCV 2015, fan-out form: variance 2 / (k * k * out).
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's linear layers: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), whose variance is 1 / (3 fan_in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype for reductions and logits: float32 for bfloat16 and float32, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def conv(
    features: int,
    size: int | tuple[int, int],
    stride: int = 1,
    *,
    groups: int = 1,
    padded: bool = True,
    use_bias: bool = False,
    kernel_init: Initializer = kaiming_normal_fan_out,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    name: str,
) -> nn.Conv:
    """A convolution padded by size // 2 on BOTH sides, as in PyTorch, or with `padded` False not at all.

    "SAME" would pad a strided convolution on the far side only. A `size` of two is height and width. A bias starts at
    zero; the output is then as wide as the bias, `param_dtype`.
    """
    window = (size, size) if isinstance(size, int) else size
    return nn.Conv(
        features,
        window,
        stride,
        padding=[(side // 2, side // 2) if padded else (0, 0) for side in window],
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        param_dtype=param_dtype,
        promote_dtype=mixed.promote,
        conv_general_dilated=mixed.conv_general_dilated,
        name=name,
    )


def batch_norm(
    train: bool, *, epsilon: float = 1e-5, dtype: DTypeLike, param_dtype: DTypeLike, name: str
) -> nn.BatchNorm:
    """Batch normalization with scale 1 and bias 0, whose output is in `dtype`.

    Statistics are over the whole global batch and float32 (float64 where `dtype` is); the running ones move
    by 0.1 a step and keep the biased variance (PyTorch stores n / (n - 1) times it).
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        # Forcing would keep the running statistics of a float64 model in float32.
        force_float32_reductions=jnp.finfo(dtype).bits <= 32,
        name=name,
    )


class ConvNorm(nn.Module):
    """A convolution, without bias unless `use_bias`, then batch normalization; see `conv` and `batch_norm`."""

    features: int
    size: int | tuple[int, int] = 3
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    groups: int = 1
    use_bias: bool = False
    kernel_init: Initializer = kaiming_normal_fan_out
    epsilon: float = 1e-5
    padded: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features] in `dtype`, where `padded`."""
        x = conv(
            self.features,
            self.size,
            self.stride,
            groups=self.groups,
            padded=self.padded,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(x)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = batch_norm(train, epsilon=self.epsilon, **types, name="norm")
        return norm(x.astype(self.dtype))


def linear(
    fan_in: int,
    units: int,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    name: str,
    *,
    kernel_init: Initializer = uniform_fan_in,
    bias_init: Initializer | None = None,
) -> nn.Dense:
    """A dense layer; kernel and bias start at U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), as in PyTorch.

    It multiplies in `dtype`; its output is as wide as the bias, `param_dtype`.
    """
    bound = fan_in**-0.5

    def uniform(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        units,
        kernel_init=kernel_init,
        bias_init=bias_init or uniform,
        dtype=dtype,
        param_dtype=param_dtype,
        promote_dtype=mixed.promote,
        dot_general=mixed.dot_general,
        name=name,
    )


def head(
    pooled: Float[Array, "batch channels"],
    num_classes: int,
    param_dtype: DTypeLike,
    *,
    kernel_init: Initializer = uniform_fan_in,
    bias_init: Initializer | None = None,
) -> Float[Array, "batch classes"]:
    """The classifier "head" on the penultimate vector, in the vector's dtype (call in a compact method)."""
    width, dtype = pooled.shape[-1], pooled.dtype
    layer = linear(width, num_classes, dtype, param_dtype, "head", kernel_init=kernel_init, bias_init=bias_init)
    return checkpoint_name(layer(pooled).astype(dtype), "logits")


def keep(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Names `x` "block": what rematerialization keeps of a network's forward pass; see `jkd.train.remat`."""
    return checkpoint_name(x, "block")


def global_average_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch channels"]:
    """The mean over height and width, taken and kept in float32 at least."""
    return x.mean(axis=(1, 2), dtype=at_least_float32(x.dtype))


def check_classes(num_classes: int) -> None:
    """Raises UserError where there are fewer than two classes."""
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, got {num_classes}.")


def check_width(width: int) -> None:
    """Raises UserError where a layer would have no channels."""
    if width < 1:
        raise UserError(f"width must be at least 1, got {width}.")


def check_images(images: Images, rank: int | None = None) -> Num[Array, " batch *image"]:
    """Returns the images as a JAX array, once their dtype and rank are known to be usable.

    Raises:
      UserError: where images are not floating point, or not of rank `rank`. A convolution would read
        [batch, height, width] as one image with many channels.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images must be floating point, got {images.dtype}: scale and normalize them first.")
    if rank is not None and images.ndim != rank:
        raise UserError(f"images must be [batch, height, width, channels], got the shape {images.shape}.")
    return jnp.asarray(images)
