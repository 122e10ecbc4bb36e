"""Inception v3 for ImageNet, and the variant whose features the Frechet Inception distance is named after.

Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016, in torchvision's form: batch
normalization (with an epsilon of 0.001) after every convolution, no auxiliary head. torchvision's dropout before the
head is left out, and its trained weights expect images in [-1, 1].
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.channels import narrowed
from jkd.checks import Tensor, as_float
from jkd.errors import UserError
from jkd.nn.layers import (
    ConvNorm,
    Images,
    check_classes,
    check_images,
    check_width,
    global_average_pool,
    head,
    keep,
)
from jkd.nn.outputs import Outputs

Maps = Float[Array, "batch height width channels"]
SMALLEST = 75  # pixels a side: what leaves one position in the last block
FID_SIDE = 299

# Of the stem: channels, size, stride and whether the edges are padded; max pooling follows the third and the fifth.
STEM_LAYERS = ((3, 2, False), (3, 1, False), (3, 1, True), (1, 1, True), (3, 1, False))
STEM = (32, 32, 64, 80, 192)

# Of each kind of unit: its branches, and the layers of each by name, height and width. One that ends in "b" reads what
# the layer before it reads; their channels come one behind the other.
_DOUBLE = (("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3), ("branch3x3dbl_3", 3, 3))
_ENDS = (("branch1x1", 1, 1),), (("branch_pool", 1, 1),)
BRANCHES = {
    "A": (_ENDS[0], (("branch5x5_1", 1, 1), ("branch5x5_2", 5, 5)), _DOUBLE, _ENDS[1]),
    "B": ((("branch3x3", 3, 3),), _DOUBLE),
    "C": (
        _ENDS[0],
        (("branch7x7_1", 1, 1), ("branch7x7_2", 1, 7), ("branch7x7_3", 7, 1)),
        (
            ("branch7x7dbl_1", 1, 1),
            ("branch7x7dbl_2", 7, 1),
            ("branch7x7dbl_3", 1, 7),
            ("branch7x7dbl_4", 7, 1),
            ("branch7x7dbl_5", 1, 7),
        ),
        _ENDS[1],
    ),
    "D": (
        (("branch3x3_1", 1, 1), ("branch3x3_2", 3, 3)),
        (("branch7x7x3_1", 1, 1), ("branch7x7x3_2", 1, 7), ("branch7x7x3_3", 7, 1), ("branch7x7x3_4", 3, 3)),
    ),
    "E": (
        _ENDS[0],
        (("branch3x3_1", 1, 1), ("branch3x3_2a", 1, 3), ("branch3x3_2b", 3, 1)),
        (*_DOUBLE[:2], ("branch3x3dbl_3a", 1, 3), ("branch3x3dbl_3b", 3, 1)),
        _ENDS[1],
    ),
}
REDUCING = ("B", "D")
# Of the first unit of each block, and of the others.
KINDS = (("A", "A"), ("B", "C"), ("D", "E"))
# Of each unit, the channels of its layers in the order of BRANCHES.
WIDTHS = (
    tuple((64, 48, 64, 64, 96, 96, pool) for pool in (32, 64, 64)),
    ((384, 64, 96, 96), *((192, c, c, 192, c, c, c, c, 192, 192) for c in (128, 160, 160, 192))),
    ((192, 320, 192, 192, 192, 192), *2 * ((320, 384, 384, 384, 448, 384, 384, 384, 192),)),
)

_layer = functools.partial(ConvNorm, kernel_init=nn.initializers.normal(0.1), epsilon=1e-3)
_reduce = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


class InceptionV3Unit(nn.Module):
    """Branches of convolutions, and one of pooling, whose channels come one behind the other.

    In kinds "B" and "D" the last convolution of each branch and the pooling have a stride of 2 and no padding.

    Attributes:
      kind: one of `BRANCHES`.
      widths: channels of the convolutions, in the order of `BRANCHES`.
      pool: of 3x3 pixels with stride 1: "mean" (zeros beyond the edges count), "inner_mean" (they do not) or "max".
      dtype: of the convolutions.
      param_dtype: of the parameters.
    """

    kind: str
    widths: tuple[int, ...]
    pool: str = "mean"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch new_height new_width new_channels"]:
        """Maps [B, H, W, C] to [B, H, W, D], or in kinds "B" and "D" to [B, (H - 1) // 2, (W - 1) // 2, D]."""
        widths, parts = list(self.widths), []
        for branch in BRANCHES[self.kind]:
            y = self._pooled(x) if branch == _ENDS[1] else x
            parts.append(self._branch(y, branch, [widths.pop(0) for _ in branch], train))
        if self.kind in REDUCING:
            parts.append(_reduce(x))
        return jnp.concatenate(parts, axis=-1)

    def _branch(
        self, x: Maps, layers: tuple[tuple[str, int, int], ...], widths: list[int], train: bool
    ) -> Float[Array, "batch new_height new_width new_channels"]:
        make, before = functools.partial(_layer, dtype=self.dtype, param_dtype=self.param_dtype), x
        for (name, *window), width in zip(layers, widths, strict=True):
            halves = self.kind in REDUCING and name == layers[-1][0]
            layer = make(width, (window[0], window[1]), 2 if halves else 1, padded=not halves, name=name)
            if name.endswith("b"):
                x = jnp.concatenate([x, nn.relu(layer(before, train))], axis=-1)
            else:
                before, x = x, nn.relu(layer(x, train))
        return x

    def _pooled(self, x: Maps) -> Maps:
        place = {"window_shape": (3, 3), "strides": (1, 1), "padding": ((1, 1), (1, 1))}
        if self.pool == "max":
            return nn.max_pool(x, **place)
        return nn.avg_pool(x, **place, count_include_pad=self.pool == "mean")


class InceptionV3(nn.Module):
    """A stem of five convolutions, blocks of inception units, mean, linear head.

    Attributes:
      num_classes: at least 2.
      fid: means over 3x3 pixels leave out what lies beyond the edges, and the last unit of the third block takes the
        maximum instead: the network of the Frechet Inception distance. See `fid_images`.
      stem_widths: channels of the convolutions of the stem.
      widths: of each of at most three blocks, and of each of its units, the channels of its convolutions in the order
        of `BRANCHES`; the second and the third block begin with a unit that halves the map.
      dtype: of the convolutions; the pooled vector and the logits are float32 at least.
      param_dtype: of the parameters; the running statistics are float32 at least.

    Raises:
      UserError: where a field is not as above, or the images are not floating [batch, height, width, channels] or
        smaller than 75 pixels a side (which initialization, whose result does not depend on it, does not mind).
    """

    num_classes: int
    fid: bool = False
    stem_widths: tuple[int, ...] = STEM
    widths: tuple[tuple[tuple[int, ...], ...], ...] = WIDTHS
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        check_classes(self.num_classes)
        if not 1 <= len(self.widths) <= len(KINDS) or not all(self.widths):
            raise UserError(f"widths must name the units of one to three blocks, got {self.widths}.")
        if len(self.stem_widths) != len(STEM):
            raise UserError(f"stem_widths must name five convolutions, got {self.stem_widths}.")
        for b, units in enumerate(self.widths):
            for u, widths in enumerate(units):
                count = sum(map(len, BRANCHES[KINDS[b][u > 0]]))
                if len(widths) != count:
                    raise UserError(f"widths must name {count} convolutions for unit {u} of block {b + 1}: {widths}.")
        for width in (*self.stem_widths, *(c for block in self.widths for unit in block for c in unit)):
            check_width(width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Outputs:
        """Returns logits and the features "stem", "block1" ... "blockN" and "pool"."""
        x = check_images(images, rank=4)
        if min(x.shape[1:3]) < SMALLEST and not self.is_initializing():
            raise UserError(f"images must have sides of at least {SMALLEST} pixels, got {x.shape}.")
        x = keep(self._stem(x, train))
        features = {"stem": x}
        for b, units in enumerate(self.widths, start=1):
            for u, widths in enumerate(units):
                last = b == len(KINDS) and u == len(units) - 1
                pool = ("max" if last else "inner_mean") if self.fid else "mean"
                kind, name = KINDS[b - 1][u > 0], f"block{b}_{u}"
                x = keep(InceptionV3Unit(kind, widths, pool, self.dtype, self.param_dtype, name=name)(x, train))
            features[f"block{b}"] = x
        features["pool"] = global_average_pool(x)
        start = {"kernel_init": nn.initializers.normal(0.1)}
        return Outputs(head(features["pool"], self.num_classes, self.param_dtype, **start), features)

    def _stem(self, x: Maps, train: bool) -> Float[Array, "batch new_height new_width new_channels"]:
        layer = functools.partial(_layer, dtype=self.dtype, param_dtype=self.param_dtype)
        for i, (width, (size, stride, padded)) in enumerate(zip(self.stem_widths, STEM_LAYERS, strict=True), start=1):
            x = nn.relu(layer(width, size, stride, padded=padded, name=f"stem{i}")(x, train))
            x = _reduce(x) if i in (3, 5) else x
        return x


def inception_v3(
    num_classes: int = 1000,
    *,
    fid: bool = False,
    multiplier: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> InceptionV3:
    """Inception v3: channels are `multiplier` times the published ones, rounded up.

    With `fid` and 1008 classes it is the network of the Frechet Inception distance: see `fid_images`.

    Raises:
      UserError: where `multiplier` is not positive, or there are fewer than two classes.
    """
    if not 0 < multiplier < float("inf"):
        raise UserError(f"multiplier must be positive and finite, got {multiplier}.")
    stem, widths = jax.tree.map(lambda width: narrowed(width, multiplier), (STEM, WIDTHS))
    return InceptionV3(num_classes, fid, stem, widths, dtype, param_dtype)


def fid_images(images: Float[Tensor, "batch height width 3"]) -> Float[Array, "batch 299 299 3"]:
    """Images in [0, 1] as the network of the Frechet Inception distance reads them: 299 x 299, in [-1, 1].

        y = 2 resize(x) - 1,  bilinear with half-pixel centers, without a filter against aliasing

    A number may be called FID where all of these hold, and none comes with this library but the arithmetic:

    1. the weights are those that TensorFlow published for it in 2015 (`inception_v3(1008, fid=True)`, with the state
       dict of their port to PyTorch through `jkd.interop.torch.from_torch`);
    2. the images went through bytes: round generated ones to multiples of 1/255 first;
    3. they were resized by this function (from bytes, the original program resizes with other centers: the numbers
       differ a little, so say which resizing it was);
    4. the features are "pool" (2,048 numbers) of `apply_eval`, in float32;
    5. `jkd.metrics.frechet_distance` is of the moments of at least some 10,000 images on either side, and their
       numbers are said with it (50,000 generated ones are customary).

    Raises:
      UserError: if the images are not floating [batch, height, width, 3].

    Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium,
      NeurIPS 2017; on what resizing does to it, Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN
      Evaluation, CVPR 2022.
    """
    if jnp.ndim(images) != 4 or jnp.shape(images)[-1] != 3:
        raise UserError(f"images must be [batch, height, width, 3], got {list(jnp.shape(images))}.")
    x = as_float("images", images)
    return 2 * jax.image.resize(x, (len(x), FID_SIDE, FID_SIDE, 3), "bilinear", antialias=False) - 1
