"""The generator of StyleGAN2, with a style made of latents or of a condition."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jkd.errors import UserError, unknown
from jkd.gan.checks import check_condition
from jkd.gan.layers import (
    SELF_ATTENTION,
    EqualizedConv,
    EqualizedDense,
    StyledConv,
    equalized_kernel,
    normalize_pixels,
    self_attention,
)
from jkd.gan.modulation import modulated_kernel
from jkd.gan.outputs import Generated
from jkd.gan.resampling import Maps, NewMaps, upsample
from jkd.nn.layers import at_least_float32

STYLE_SOURCES = ("latent", "condition", "none")
Latents = Float[Array, "batch latent_dim"]
Condition = Float[Array, "batch condition_dim"]
Styles = Float[Array, "batch layers style_dim"]


def count_channels(resolution: int, fmap_base: int, fmap_max: int) -> int:
    """The channels of maps of this resolution: 2 fmap_base / resolution, in [1, fmap_max]."""
    return max(min(2 * fmap_base // resolution, fmap_max), 1)


def check_resolution(resolution: int, attention: tuple[tuple[int, str], ...], kinds: tuple[str, ...]) -> None:
    """Stops a resolution that is no power of two in 8 ... 1024, and attention at one that the network lacks.

    Raises:
      UserError: if so.
    """
    known = [2**i for i in range(2, 11)]
    if resolution not in known[1:]:
        raise UserError(f"resolution must be a power of two from 8 to 1024, got {resolution}.")
    for place, kind in attention:
        if place not in known or place > resolution:
            raise UserError(f"attention: there are no maps of {place}x{place} at resolution {resolution}.")
        if kind not in kinds:
            raise unknown("attention", kind, kinds)


class Mapping(nn.Module):
    """The network that makes styles: dense layers with `leaky_relu`, at a hundredth of the learning rate.

    Attributes:
      style_dim: units of all layers.
      layers: how many.
      embed: units of the embedding of a condition that is joined to latents; 0 where there is none.
      normalize: whether the input is divided by its root mean square.
      dtype: of the computation and the output.
      param_dtype: of the parameters.
    """

    style_dim: int
    layers: int
    embed: int
    normalize: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"], condition: Condition | None) -> Float[Array, "batch style_dim"]:
        """Maps latents (or bits) and, where there is an embedding, a condition to styles."""
        x = x.astype(self.dtype)
        if self.embed and condition is not None:
            shape = (condition.shape[-1], self.embed)
            table = self.param("embedding", nn.initializers.normal(1.0), shape, self.param_dtype)
            x = jnp.concatenate((x, condition.astype(self.dtype) @ table.astype(self.dtype)), -1)
        x = normalize_pixels(x) if self.normalize else x
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i in range(self.layers):
            x = EqualizedDense(self.style_dim, lr_multiplier=0.01, activate=True, **types, name=f"dense{i}")(x)
        return x


class Synthesis(nn.Module):
    """The network that makes images of styles; attributes as in `StyleGAN2Generator`.

    `constant`: whether it starts from a learned constant rather than from latents.
    """

    resolution: int
    channels: int
    fmap_base: int
    fmap_max: int
    architecture: str
    attention: tuple[tuple[int, str], ...]
    modulated: tuple[int, int]
    constant: bool
    noise: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, styles: Styles | None, latents: Latents | None) -> Generated:
        """Maps styles, latents or both to images and the maps before them."""
        x, features = self._start(styles, latents), {}
        image: Any = None
        for level in range(2, self.resolution.bit_length()):
            size, first = 2**level, 2 * level - 5  # the index of the block's first style
            x = self._block(x, size, styles, first)
            for place, kind in self.attention:
                if place == size:
                    block: Any = self_attention(kind, x.shape[-1], **self._types(), name=f"{kind}_attention{size}")
                    x = block(x)
            features[f"{size}x{size}"] = x
            if self.architecture == "skip" or size == self.resolution:
                color = self._conv(
                    self.channels, f"to_rgb{size}", size=1, demodulate=False, noise=False, activate=False
                )
                new = color(x, self._style(styles, first + 2, size)).astype(at_least_float32(self.dtype))
                image = new if image is None else upsample(image) + new
        return Generated(image, features)

    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _conv(self, features: int, name: str, **options: Any) -> StyledConv:
        return StyledConv(features, **options, **self._types(), name=name)

    def _style(self, styles: Styles | None, layer: int, size: int) -> Float[Array, "batch style_dim"] | None:
        lowest, highest = self.modulated
        return styles[:, layer] if styles is not None and lowest <= size <= highest else None

    def _start(self, styles: Any, latents: Any) -> NewMaps:
        """The maps of 4x4 that everything is made of."""
        width = count_channels(4, self.fmap_base, self.fmap_max)
        if not self.constant:
            return EqualizedDense(16 * width, activate=True, **self._types(), name="start")(latents).reshape(
                -1, 4, 4, width
            )
        constant = self.param("constant", nn.initializers.normal(1.0), (4, 4, width), self.param_dtype)
        return jnp.broadcast_to(constant.astype(self.dtype)[None], (len(styles), 4, 4, width))

    def _block(self, x: Maps, size: int, styles: Styles | None, first: int) -> NewMaps:
        """Two convolutions, the first of which doubles the size; at 4x4 there is only the second."""
        width, before = count_channels(size, self.fmap_base, self.fmap_max), x
        if size > 4:
            up = self._conv(width, f"up{size}", up=True, noise=self.noise)
            x = up(x, self._style(styles, first, size))
        x = self._conv(width, f"conv{size}", noise=self.noise)(x, self._style(styles, first + 1, size))
        if self.architecture == "skip" or size == 4:
            return x
        short = EqualizedConv(width, 1, "up", activate=False, **self._types(), name=f"shortcut{size}")(before)
        return (x + short) * jnp.asarray(math.sqrt(0.5), x.dtype)


class StyleGAN2Generator(nn.Module):
    """Images from latents: a style for every layer, and convolutions whose weights the style scales.

    By default the style w is made of latents and images start from a learned constant. With `style_from="condition"`
    the style is made of the condition (bits, as they are) and images start from latents: one network that is many, told
    apart by their condition, each of which `gan.bake_fingerprint` turns into a network of its own. That is
    `style_from="none"`: no styles, images start from latents.

    Attributes:
      resolution: of images, a power of two from 8 to 1024.
      channels: of images.
      latent_dim: of latents.
      style_dim: of styles.
      mapping_layers: dense layers between latents and styles.
      fmap_base: maps of resolution r have 2 fmap_base / r channels (the paper's config-f: 16384, config-e: 8192),
      fmap_max: but at most so many.
      architecture: "skip" (the image is a sum of colors of all resolutions) or "resnet".
      attention: pairs (resolution, kind): "global", "patchwise", "dynamic" or "tokens"; blocks follow the convolutions
        of that resolution.
      condition_dim: width of the condition; 0 for none. With `style_from="latent"` it is embedded, joined to latents.
      style_from: "latent", "condition" or "none".
      modulated: the lowest and the highest resolution whose layers styles scale; by default all. Others are plain.
      noise: whether noise is added after every 3x3 convolution; see `layers.StyledConv`.
      dtype: of the convolutions; styles and images are in float32 at least.
      param_dtype: of the parameters.

    References: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020; Yu et al., Dual
      Contrastive Loss and Attention for GANs, ICCV 2021 (attention); Yu et al., Responsible Disclosure of Generative
      Models Using Scalable Fingerprinting, ICLR 2022 (styles from bits).
    """

    resolution: int
    channels: int = 3
    latent_dim: int = 512
    style_dim: int = 512
    mapping_layers: int = 8
    fmap_base: int = 16384
    fmap_max: int = 512
    architecture: str = "skip"
    attention: tuple[tuple[int, str], ...] = ()
    condition_dim: int = 0
    style_from: str = "latent"
    modulated: tuple[int, int] | None = None
    noise: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Checks the attributes and makes the two networks."""
        self._check()
        if self.style_from != "none":
            self.mapper = Mapping(
                self.style_dim,
                self.mapping_layers,
                self.latent_dim if self.condition_dim and self.style_from == "latent" else 0,
                self.style_from == "latent",
                at_least_float32(self.dtype),
                self.param_dtype,
            )
        self.synthesis = Synthesis(
            self.resolution,
            self.channels,
            self.fmap_base,
            self.fmap_max,
            self.architecture,
            self.attention,
            (4, self.resolution) if self.modulated is None else self.modulated,
            self.style_from == "latent",
            self.noise,
            self.dtype,
            self.param_dtype,
        )

    def _check(self) -> None:
        check_resolution(self.resolution, self.attention, SELF_ATTENTION)
        if self.architecture not in ("skip", "resnet"):
            raise unknown("architecture", self.architecture, ("skip", "resnet"))
        if self.style_from not in STYLE_SOURCES:
            raise unknown("style_from", self.style_from, STYLE_SOURCES)
        if (self.style_from == "condition" and not self.condition_dim) or (
            self.style_from == "none" and self.condition_dim
        ):
            raise UserError(
                "condition_dim must be at least 1 where styles come from a condition, and 0 where there are none; got "
                f"{self.condition_dim} with style_from={self.style_from!r}."
            )

    @property
    def num_styles(self) -> int:
        """Styles an image: one for every convolution, where a block's last and the next block's first differ."""
        return 2 * (self.resolution.bit_length() - 1) - 2

    def __call__(self, latents: Latents, condition: Condition | None = None, train: bool = False) -> Generated:
        """Images and maps of latents and, where there is one, a condition.

        Raises:
          UserError: on shapes that do not fit the attributes.
        """
        del train  # the same in both: noise depends on the random stream alone
        if self.style_from == "none":
            check_condition(condition, 0)
            return self.synthesize(None, latents)
        return self.synthesize(self.mapping(latents, condition), latents)

    def mapping(self, latents: Latents, condition: Condition | None = None) -> Styles:
        """The styles of all layers, equal for each; what `mix_styles`, `truncate` and path lengths work on."""
        if self.style_from == "none":
            raise UserError("mapping: a generator with style_from='none' has no styles.")
        self._check_latents(latents)
        check_condition(condition, self.condition_dim)
        given: Any = (latents, condition) if self.style_from == "latent" else (condition, None)
        style = self.mapper(*given)
        return jnp.broadcast_to(style[:, None], (len(style), self.num_styles, self.style_dim))

    def synthesize(self, styles: Styles | None, latents: Latents | None = None) -> Generated:
        """Images and maps of styles, and of latents where images start from them."""
        if self.style_from != "none" and (styles is None or styles.shape[1:] != (self.num_styles, self.style_dim)):
            got = "none" if styles is None else list(styles.shape)
            raise UserError(f"styles must be [batch, {self.num_styles}, {self.style_dim}], got {got}.")
        if self.style_from != "latent":
            self._check_latents(latents)
        return self.synthesis(styles, latents)

    def baked(self) -> "StyleGAN2Generator":
        """The ordinary generator that `bake` makes parameters for: no mapping, no styles, no affine layers.

        Raises:
          UserError: if styles do not come from a condition.
        """
        if self.style_from != "condition":
            raise UserError(f"generator must have style_from='condition', got {self.style_from!r}.")
        return self.clone(style_from="none", condition_dim=0, modulated=None)

    def bake(self, params: Any, condition: Float[Array, "condition_dim"]) -> dict[str, Any]:
        """Parameters of `baked()` that make the images of this one condition: see `gan.bake_fingerprint`.

        Every modulated kernel W is replaced by the W'' that the condition makes of it, so the network shows neither the
        condition nor how another one would look. Images are those of the conditional one, to rounding.
        """
        self.baked()  # for its check
        latents = jnp.zeros((1, self.latent_dim))
        styles: Any = self.apply({"params": params}, latents, condition[None], method="mapping")
        layers = params["synthesis"].items()
        return {
            "synthesis": {
                name: _bake_layer(layer, styles[:, 0], demodulate=not name.startswith("to_rgb"))
                if "affine" in layer
                else layer
                for name, layer in layers
            }
        }

    def _check_latents(self, latents: Latents | None) -> None:
        if latents is None or latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            got = "none" if latents is None else list(latents.shape)
            raise UserError(f"latents must be [batch, {self.latent_dim}], got {got}.")


def _bake_layer(layer: Any, style: Float[Array, "1 style_dim"], *, demodulate: bool) -> dict[str, Any]:
    """The layer's parameters without the affine ones, stored so that they are used as W''."""
    affine, stored = layer["affine"], layer["kernel"]
    scales = EqualizedDense(stored.shape[-2], dtype=style.dtype, parent=None).apply({"params": affine}, style)[0]
    kernel = modulated_kernel(equalized_kernel(stored), scales, demodulate=demodulate)
    fan_in = math.prod(stored.shape[:-1])
    rest = {name: leaf for name, leaf in layer.items() if name not in ("affine", "kernel")}
    return rest | {"kernel": kernel.astype(stored.dtype) * math.sqrt(fan_in)}
