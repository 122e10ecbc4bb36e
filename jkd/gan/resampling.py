"""Twice or half the size: the filter [1, 3, 3, 1], alone and together with convolutions of stride 2.

A convolution that doubles or halves a map gives the same as one of stride 1 at the smaller of the two sizes: what
takes 2x2 pixels of the larger map is a channel of the smaller one. That has four times the multiplications and no
gaps. XLA's CPU backend is slow at gaps (dilated inputs and kernels, above all in second derivatives) and fast at 3x3
convolutions of stride 1 (`jkd.nn.winograd`), so a CPU takes this form and accelerators the strided one.
"""

import functools
import operator
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jkd.nn import mixed, platform

Maps = Float[Array, "batch height width channels"]
NewMaps = Float[Array, "batch new_height new_width features"]
Kernel = Float[Array, "size size inputs outputs"]
# [3 neighbors in the smaller map, 2 pixels of the larger one, size of the kernel]
Taps: TypeAlias = np.ndarray

FILTER = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


def _taps(size: int, start: int, *, up: bool, filtered: bool) -> Taps:
    """What each weight of a kernel along one axis adds to the weight between two pixels of maps of different sizes.

    Position t of the (filtered) kernel joins pixel q of the smaller map, at 2 q in the larger one, with pixel
    2 q + start + t of the larger where the map is halved; where it is doubled, pixel o with 2 q = o + start + t.
    """
    taps = np.zeros((3, 2, size))
    for position, weight in enumerate(FILTER if filtered else (1,)):
        for k in range(size):
            shift = start + position + k
            if not up:
                taps[shift // 2 + 1, shift % 2, k] += weight
                continue
            for phase in range(2):
                if (phase + shift) % 2 == 0:
                    taps[(phase + shift) // 2 + 1, phase, k] += 2 * weight if filtered else weight
    return taps


UP_FILTERED = _taps(3, -3, up=True, filtered=True)
DOWN_FILTERED = _taps(3, -2, up=False, filtered=True)
UP = _taps(4, -2, up=True, filtered=False)
DOWN = _taps(4, -1, up=False, filtered=False)


def _convolve(x: Maps, kernel: Array, stride: int, padding: int, *, gaps: int = 1) -> NewMaps:
    layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    return mixed.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, lhs_dilation=(gaps, gaps), dimension_numbers=layout
    )


def pixels_to_channels(x: Maps) -> NewMaps:
    """[batch, height / 2, width / 2, 4 channels]: every 2x2 pixels side by side."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, 4 * channels)


def channels_to_pixels(x: Maps) -> NewMaps:
    """[batch, 2 height, 2 width, channels / 4]: the inverse of `pixels_to_channels`."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height, width, 2, 2, channels // 4)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels // 4)


def _up_without_gaps(x: Maps, kernel: Kernel, taps: Taps) -> NewMaps:
    weights = jnp.asarray(taps, kernel.dtype)
    phases = jnp.einsum("arx,bsy,xyio->abirso", weights, weights, kernel)
    return channels_to_pixels(_convolve(x, phases.reshape(3, 3, x.shape[-1], -1), 1, 1))


def _down_without_stride(x: Maps, kernel: Kernel, taps: Taps) -> NewMaps:
    weights = jnp.asarray(taps, kernel.dtype)
    phases = jnp.einsum("arx,bsy,xyio->abrsio", weights, weights, kernel)
    return _convolve(pixels_to_channels(x), phases.reshape(3, 3, -1, kernel.shape[-1]), 1, 1)


def blur(x: Maps, padding: int, *, gain: float = 1.0) -> NewMaps:
    """The filter [1, 3, 3, 1] / 8 along both axes, times gain, over maps padded with zeros."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for axis in (1, 2):
        size = x.shape[axis] - 3
        parts = [tap * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, tap in enumerate(FILTER)]
        x = functools.reduce(operator.add, parts)
    return gain * x


def _neighbors(x: Maps, axis: int) -> tuple[NewMaps, NewMaps]:
    """The pixel before and the pixel after each along the axis, 0 outside the map."""
    before, after = [(0, 0)] * 4, [(0, 0)] * 4
    before[axis], after[axis] = (1, 0), (0, 1)
    size = x.shape[axis]
    return (
        jax.lax.slice_in_dim(jnp.pad(x, before), 0, size, axis=axis),
        jax.lax.slice_in_dim(jnp.pad(x, after), 1, size + 1, axis=axis),
    )


def upsample(x: Maps) -> NewMaps:
    """Twice the size: zeros between pixels, then the filter [1, 3, 3, 1] / 4 along both axes, zeros outside the map."""
    for axis in (1, 2):
        before, after = _neighbors(x, axis)
        pairs = jnp.stack((0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after), axis + 1)
        x = pairs.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


def downsample(x: Maps) -> NewMaps:
    """Half the size: the filter [1, 3, 3, 1] / 8 along both axes, zeros outside the map, then every second pixel."""
    for axis in (1, 2):
        even, odd = (jax.lax.slice_in_dim(x, i, None, 2, axis) for i in range(2))
        x = 0.375 * (even + odd) + 0.125 * (_neighbors(odd, axis)[0] + _neighbors(even, axis)[1])
    return x


def filtered_up_with_gaps(x: Maps, kernel: Array) -> NewMaps:
    """`filtered_conv_up` as accelerators compute it."""
    return blur(_convolve(x, kernel, 1, 2, gaps=2), 1, gain=4.0)


def filtered_down_with_stride(x: Maps, kernel: Array) -> NewMaps:
    """`filtered_conv_down` as accelerators compute it."""
    return _convolve(blur(x, 2), kernel, 2, 0)


def up_with_gaps(x: Maps, kernel: Array) -> NewMaps:
    """`conv_up` as accelerators compute it."""
    return _convolve(x, kernel, 1, 2, gaps=2)


def down_with_stride(x: Maps, kernel: Array) -> NewMaps:
    """`conv_down` as accelerators compute it."""
    return _convolve(x, kernel, 2, 1)


def filtered_conv_up(x: Maps, kernel: Float[Array, "3 3 channels features"]) -> NewMaps:
    """A 3x3 convolution of the map with zeros between its pixels, then the filter [1, 3, 3, 1] / 4 along both axes.

    Reference: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.
    """
    if platform.target() == "cpu":
        return _up_without_gaps(x, kernel, UP_FILTERED)
    return filtered_up_with_gaps(x, kernel)


def filtered_conv_down(x: Maps, kernel: Float[Array, "3 3 channels features"]) -> NewMaps:
    """The filter [1, 3, 3, 1] / 8 along both axes, then a 3x3 convolution of stride 2.

    Reference: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.
    """
    if platform.target() == "cpu":
        return _down_without_stride(x, kernel, DOWN_FILTERED)
    return filtered_down_with_stride(x, kernel)


def conv_up(x: Maps, kernel: Float[Array, "4 4 channels features"]) -> NewMaps:
    """A 4x4 convolution of the map with zeros between its pixels: twice the size, every output sees 2x2 pixels."""
    return _up_without_gaps(x, kernel, UP) if platform.target() == "cpu" else up_with_gaps(x, kernel)


def conv_down(x: Maps, kernel: Float[Array, "4 4 channels features"]) -> NewMaps:
    """A 4x4 convolution of stride 2, padded by 1: half the size."""
    return _down_without_stride(x, kernel, DOWN) if platform.target() == "cpu" else down_with_stride(x, kernel)
