"""3x3 convolutions by minimal filtering, for a CPU: a quarter of the multiplications, in blocks that its cache holds.

Winograd's F(4x4, 3x3): with fixed matrices A, B, G, each 4x4 tile Y of the output is made of a 6x6 tile X of the input,

    Y = A^T ((G W G^T) * (B^T X B)) A    (* elementwise, summed over the input's channels: 36 matrix products)

Float32 results and gradients differ from the direct ones by some 1e-5 of the largest, rather than 1e-6. The gradients
are the filtering's own transposes: as few products, by blocks again.

Reference: Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Kernel = Float[Array, "3 3 channels features"]
Matrix = Sequence[Sequence[int | float]]

TILE, SPAN = 4, 6
CHANNELS = 32  # with fewer, the tiles cost more than the products
BLOCK = 2**14  # values of one of a block's 36 matrices: they stay in the cache
ROWS = 32  # of such a matrix: with fewer, the products wait for the kernel
WORK = 2**27  # direct multiplications: with fewer, milliseconds are gained for seconds of compiling
_DIRECT = ContextVar("direct", default=False)

# B^T, G and A^T of the reference, for the points 0, 1, -1, 2, -2 and infinity.
INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def fits(x: Any, w: Any, strides: Sequence[int], padding: Any, **options: Any) -> bool:
    """Whether `lax.conv_general_dilated` of these arguments is `conv3x3(x, w)`, and faster so.

    With several devices it is not: a loop over the batch would gather what they share.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or _DIRECT.get():
        return False
    if x.ndim != 4 or w.shape[:2] != (3, 3) or {x.dtype, w.dtype} != {np.dtype(np.float32)}:
        return False
    plain = options.pop("dimension_numbers", None) == NHWC and options.pop("feature_group_count", 1) == 1
    plain &= all(np.all(np.equal(options.pop(f"{side}_dilation", None) or 1, 1)) for side in ("lhs", "rhs"))
    plain &= all(value is None for value in options.values())  # an asked precision, say
    same = np.array_equal(strides, (1, 1)) and not isinstance(padding, str) and np.array_equal(padding, [(1, 1)] * 2)
    if not (plain and same) or min(w.shape[2:]) < CHANNELS or x.shape[1] % TILE or x.shape[2] % TILE:
        return False
    work = math.prod(x.shape[:3]) * math.prod(w.shape)
    return work >= WORK and images_per_block(x.shape, w.shape) * tiles(x.shape) >= ROWS


@contextlib.contextmanager
def direct_only() -> Iterator[None]:
    """What is traced inside keeps the compiler's convolutions: the filtering's second derivatives compile slowly."""
    token = _DIRECT.set(True)
    try:
        yield
    finally:
        _DIRECT.reset(token)


def tiles(shape: Sequence[int]) -> int:
    """The tiles of one image."""
    return shape[1] * shape[2] // TILE**2


def images_per_block(shape: Sequence[int], kernel: Sequence[int]) -> int:
    """The largest divisor of the batch whose tiles a block may hold; 1 at least."""
    most = BLOCK // (tiles(shape) * max(kernel[2:]))
    return max((n for n in range(1, most + 1) if shape[0] % n == 0), default=1)


@jax.custom_jvp
def conv3x3(x: Images, w: Kernel) -> Float[Array, "batch height width features"]:
    """The convolution of stride 1, padded by 1, NHWC with HWIO; on accelerators the direct one."""
    return _either(x, w)


def _jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    (x, w), (dx, dw) = primals, tangents
    parts = [] if isinstance(dx, SymbolicZero) else [_either(dx, w)]
    parts += [] if isinstance(dw, SymbolicZero) else [_either(x, dw)]
    return conv3x3(x, w), functools.reduce(operator.add, parts)


conv3x3.defjvp(_jvp, symbolic_zeros=True)


def _direct(x: Any, w: Any) -> Array:
    return lax.conv_general_dilated(x, w, (1, 1), [(1, 1)] * 2, dimension_numbers=NHWC)


@jax.jit  # or an eager call would compile it every time
def _either(x: Any, w: Any) -> Array:
    return lax.platform_dependent(x, w, cpu=minimal, default=_direct)


def minimal(x: Any, w: Any) -> Array:
    """`conv3x3` by minimal filtering, on any device."""
    # Sums of slices, not products: their matrices are mostly zeros and ones, and small.
    kernel = _both(w, KERNEL, 0, 1).reshape(SPAN**2, *w.shape[2:])
    size = images_per_block(x.shape, w.shape)
    blocks = x.reshape(-1, size, *x.shape[1:])
    # Computed again for gradients: the 36 matrices of all blocks would leave the cache and come back.
    block = jax.checkpoint(lambda images: _block(images, kernel))
    return lax.map(block, blocks).reshape(*x.shape[:3], w.shape[3])


def _block(x: Images, kernel: Float[Array, "36 channels features"]) -> Array:
    batch, height, width, channels = x.shape
    rows, columns = height // TILE, width // TILE
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = _stack(_combine([_every(x, i, rows, 1) for i in range(SPAN)], INPUT), 0)
    x = _stack(_combine([_every(x, j, columns, 3) for j in range(SPAN)], INPUT), 1)
    products = lax.dot_general(x.reshape(SPAN**2, -1, channels), kernel, (((2,), (1,)), ((0,), (0,))))
    y = products.reshape(SPAN, SPAN, batch, rows, columns, -1)
    y = _stack(_combine([y[:, j] for j in range(SPAN)], OUTPUT), 4)
    y = _stack(_combine([y[i] for i in range(SPAN)], OUTPUT), 2)
    return y.reshape(batch, height, width, -1)


def _every(x: Array, start: int, count: int, axis: int) -> Array:
    """`count` slices of x, TILE apart."""
    return lax.slice_in_dim(x, start, start + TILE * (count - 1) + 1, TILE, axis)


def _both(x: Array, matrix: Matrix, *axes: int) -> Array:
    """The matrix applied along each of the axes."""
    for axis in axes:
        parts = [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
        x = jnp.stack(_combine(parts, matrix), axis)
    return x


def _stack(parts: Sequence[Any], axis: int) -> Array:
    # Without the barrier both passes are fused into one, which computes every sum of the first six times.
    return lax.optimization_barrier(jnp.stack(parts, axis))


def _combine(parts: Sequence[Any], matrix: Matrix) -> list[Any]:
    """The matrix times the vector of arrays."""

    def row(coefficients: Sequence[int | float]) -> Any:
        terms = (part if c == 1 else c * part for c, part in zip(coefficients, parts, strict=True) if c)
        return functools.reduce(operator.add, terms)

    return [row(coefficients) for coefficients in matrix]
