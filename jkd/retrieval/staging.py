"""Training in stages without recompiling: which parts of two encoders move at a step, and how fast."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from jkd.checks import concrete
from jkd.errors import UserError
from jkd.trees import path_name

# What MHSAN's parameters belong to: the first regex that is found in a path decides. The projection of the images is
# what trains first; a pretrained backbone's first layers, up to its second block, never do.
PARTS = (
    (r"^image/backbone/(stem|block1|block2)", "frozen"),
    (r"^image/head/projection", "projection"),
    (r"^image/", "image"),
    (r"^text/", "text"),
)


class Gates(NamedTuple):
    """Which parts train, and which penalties count."""

    text: Bool[Array, ""]
    image: Bool[Array, ""]
    text_diversity: Bool[Array, ""]
    image_diversity: Bool[Array, ""]


def epoch_gates(epoch: ArrayLike, *, text_from: float | int = 5, image_from: float | int = 20) -> Gates:
    """Which parts of two encoders train in an epoch; the projection of the images always does.

        text  (all of it, and its diversity)                    epoch >= text_from
        image (what is before the projection, and its diversity)  epoch >= image_from

    The defaults are the authors' for COCO; for Flickr30K they are 4 and 41. Traced epochs recompile nothing.

    Args:
      epoch: from 0; whole or not.
      text_from: the first epoch with texts.
      image_from: the first epoch with images.

    Raises:
      UserError: if the epoch is known to be negative or NaN.

    Reference: Park et al., MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020.
    """
    known = concrete(epoch)
    if known is not None and not known >= 0:
        raise UserError(f"epoch must be >= 0, got {epoch}.")
    text, image = (jnp.asarray(epoch) >= start for start in (text_from, image_from))
    return Gates(text, image, text, image)


def part_of(path: str, parts: Sequence[tuple[str, str]] = PARTS) -> str:
    """The part that a parameter of `MHSAN` belongs to: "text", "image", "projection" or "frozen".

    Raises:
      UserError: if no regex is found in the path.
    """
    for pattern, part in parts:
        if re.search(pattern, path):
            return part
    raise UserError(f"The parameter {path!r} belongs to no part: give `parts` a pattern for it.")


def staged(
    optimizer: Callable[[], optax.GradientTransformation] | optax.GradientTransformation,
    first_steps: Mapping[str, int],
    *,
    parts: Sequence[tuple[str, str]] = PARTS,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """An optimizer whose parts begin at steps of their own; until then they have zero updates and no moments.

    Every part has a state of its own that begins with its first step, as an optimizer that is given more parameters
    later. The gradients' global norm that `clip` bounds is that of the parts that train.

    Args:
      optimizer: of each part; its schedules would count from the part's first step: put one behind the result instead.
      first_steps: the first step of each part; a part that is missing trains from the start, one named "frozen" never.
      parts: (regex, part) of the parameters' paths, see `part_of`.
      clip: the largest norm of the gradients; 0: any.

    Raises:
      UserError: if a step or `clip` is negative.
    """
    if clip < 0 or any(step < 0 for step in first_steps.values()):
        raise UserError(f"first_steps and clip must be >= 0, got {dict(first_steps)} and {clip}.")
    names = {part for _, part in parts}

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: part_of(path_name(path), parts), params)

    def by_parts(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.multi_transform({name: _from_step(inner, name, first_steps) for name in names}, labels)

    moved = by_parts(optimizer)
    return optax.chain(by_parts(optax.identity()), optax.clip_by_global_norm(clip), moved) if clip else moved


def _from_step(
    inner: optax.GradientTransformation, name: str, first_steps: Mapping[str, int]
) -> optax.GradientTransformation:
    if name == "frozen":
        return optax.set_to_zero()
    first = first_steps.get(name, 0)
    return optax.transforms.conditionally_mask(inner, lambda step: step >= first) if first else inner


def rate_factors(
    steps_per_epoch: float | int,
    epochs: Sequence[float | int] = (2, 5, 10, 40),
    factors: Sequence[float | int] = (0.2, 0.5, 0.1, 0.1),
) -> Callable[[ArrayLike], ArrayLike]:
    """The factor of the learning rate at a step: the product of the factors whose epochs have begun.

    The defaults are for COCO; Flickr30K's are (0.2, 0.5, 0.1) at the epochs (3, 7, 52). (The authors' code for COCO has
    the epochs in the place of the factors, which would multiply the rate by 4,000.)

    Raises:
      UserError: if there are not as many factors as epochs, or a number is not positive.
    """
    numbers = (steps_per_epoch, *epochs, *factors)
    if len(epochs) != len(factors) or not all(number > 0 for number in numbers):
        raise UserError(f"epochs and factors must be equally many numbers > 0, got {tuple(epochs)}, {tuple(factors)}.")
    return optax.piecewise_constant_schedule(
        1.0, {round(epoch * steps_per_epoch): factor for epoch, factor in zip(epochs, factors, strict=True)}
    )
