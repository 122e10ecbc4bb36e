"""Generators and discriminators by the fields of a config's sections."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.classification import dtypes
from jkd import gan
from jkd.errors import UserError

MODELS = ("mlp", "dcgan", "stylegan2")


def attention_of(blocks: Sequence[str], field: str) -> tuple[tuple[int, str], ...]:
    """`("32:patchwise",)` as `((32, "patchwise"),)`.

    Raises:
      UserError: for anything else, naming the config's `field`.
    """
    found = []
    for block in blocks:
        resolution, _, kind = block.partition(":")
        if not resolution.isdigit() or not kind:
            raise UserError(f'{field} holds blocks as "RESOLUTION:KIND", such as "32:patchwise", got {block!r}.')
        found.append((int(resolution), kind))
    return tuple(found)


def build_generator(section: ConfigDict, shape: tuple[int, int, int], precision: str, **changes: Any) -> Any:
    """The generator of a section; `changes` are fields of the module, such as its condition."""
    named = {**dtypes(precision), **changes}
    if section.model == "mlp":
        named.setdefault("style_dim", section.style_dim)
        return gan.MLPGenerator(shape, tuple(section.hidden), **named)
    if section.model == "dcgan":
        sizes = {"image_size": shape[0], "channels": shape[-1], "latent_dim": section.latent_dim}
        return gan.DCGANGenerator(**sizes, width=section.width, **named)
    return gan.StyleGAN2Generator(
        resolution=resolution_of(shape),
        channels=shape[-1],
        latent_dim=section.latent_dim,
        style_dim=section.style_dim,
        mapping_layers=section.mapping_layers,
        fmap_base=section.fmap_base,
        fmap_max=section.fmap_max,
        architecture=section.architecture,
        attention=attention_of(section.attention, "generator.attention"),
        **named,
    )


def build_discriminator(section: ConfigDict, shape: tuple[int, int, int], precision: str, **changes: Any) -> Any:
    """The discriminator of a section; `changes` are fields of the module."""
    named = {**dtypes(precision), **changes}
    if section.model == "mlp":
        return gan.MLPDiscriminator(tuple(section.hidden), **named)
    if section.model == "dcgan":
        sizes: dict[str, Any] = {"image_size": shape[0], "channels": shape[-1]}
        return gan.DCGANDiscriminator(**sizes, width=section.width, norm=section.norm, **named)
    return gan.StyleGAN2Discriminator(
        resolution=resolution_of(shape),
        channels=shape[-1],
        fmap_base=section.fmap_base,
        fmap_max=section.fmap_max,
        architecture=section.architecture,
        attention=attention_of(section.attention, "discriminator.attention"),
        minibatch_group=section.minibatch_group,
        **named,
    )


def resolution_of(shape: tuple[int, int, int]) -> int:
    """The side of square images.

    Raises:
      UserError: where they are not square, with a side that is a power of two of at least 8.
    """
    height, width, _ = shape
    if height != width or height < 8 or height & (height - 1):
        raise UserError(
            f"stylegan2 makes square images whose side is a power of two of at least 8, got {height}x{width}: "
            "set data.resize, or another model."
        )
    return height
