"""Whether the game between generator and discriminator is still being played."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jkd.checks import Scalar, Tensor, check_positive, concrete
from jkd.errors import UserError
from jkd.gan.checks import some_batch, some_logits
from jkd.metrics import euclidean_distances


def logit_separation(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"], *, confidence: float = 0.99
) -> Float[Array, ""]:
    """The share of pairs of a real and a generated image that the discriminator tells apart beyond doubt.

        mean_ij [ r_i - f_j > 2 ln( c / (1 - c) ) ]    in [0, 1]

    The margin is that of a logistic discriminator that gives c to the one image and 1 - c to the other. Adding one
    number to all logits changes nothing, so that losses of differences of logits have the same measure; of critics
    the scale of logits is arbitrary. Near 1, the generator learns nothing from most losses. O((N + M) log M); NaN if
    a logit is NaN.

    Args:
      real_logits: r, of any shape.
      fake_logits: f, of any shape.
      confidence: c, in [0.5, 1); static.

    Raises:
      UserError: on a wrong dtype, an empty array or a confidence outside [0.5, 1).
    """
    if not 0.5 <= confidence < 1:
        raise UserError(f"confidence must lie in [0.5, 1), got {confidence}.")
    real, fake = some_logits("real_logits", real_logits).ravel(), some_logits("fake_logits", fake_logits).ravel()
    margin = 2 * math.log(confidence / (1 - confidence))
    below = jnp.searchsorted(jnp.sort(fake), real - margin)
    broken = jnp.isnan(real).any() | jnp.isnan(fake).any()
    return jnp.where(broken, jnp.nan, (below / fake.size).mean())


def _some_images(name: str, images: Tensor) -> Float[Array, " batch *image"]:
    array = some_batch(name, images)
    if len(array) < 2:
        raise UserError(f"{name} must hold at least 2 images to compare, got {len(array)}.")
    return array


def _mean_distance(images: Float[Array, " batch *image"], key: Key[Array, ""] | None) -> Float[Array, ""]:
    count = len(images)
    if key is None:
        return euclidean_distances(images, images).sum() / (count * (count - 1))
    # Each with the next of a random order: never with itself.
    mixed = images[jax.random.permutation(key, count)]
    return jnp.linalg.norm((mixed - jnp.roll(mixed, 1, 0)).reshape(count, -1), axis=1).mean()


def diversity_ratio(
    generated: Float[Tensor, " generated *image"],
    real: Float[Tensor, " real *image"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """How far apart generated images are, relative to real ones: 1 where they differ as much, 0 where all are one.

        mean_{i != j} |g_i - g_j| / mean_{i != j} |x_i - x_j|    (Euclidean distances of flat images)

    A measure of what has gone wrong, not of quality: noise is diverse too. NaN if a value is, or where traced real
    images are all alike. Not meant to be differentiated.

    Args:
      generated: g, at least 2.
      real: x, at least 2, as many or not.
      key: None compares all pairs, which takes the square of their number; a key, each image with one other.

    Raises:
      UserError: on a wrong dtype, fewer than 2 images, images of different shapes, or real images known to be alike.
    """
    made, found = _some_images("generated", generated), _some_images("real", real)
    if made.shape[1:] != found.shape[1:]:
        raise UserError(
            f"generated and real must have images of one shape, got {list(made.shape)} and {list(found.shape)}."
        )
    spread = _mean_distance(found, key)
    if concrete(spread) == 0:
        raise UserError("real must hold different images, got copies of one.")
    return jnp.where(spread == 0, jnp.nan, _mean_distance(made, key) / spread)


def duplicates(images: Float[Tensor, " batch *image"], *, tolerance: Scalar = 0.01) -> Float[Array, ""]:
    """The share of images with a twin in the batch, as a generator makes that knows few images.

        mean_i [ min_{j != i} sqrt( mean_p (x_ip - x_jp)^2 ) <= tolerance ]    in [0, 1]

    All pairs are compared. NaN if a value is.

    Args:
      images: about [-1, 1], at least 2.
      tolerance: > 0; the default is little more than one of 256 levels of brightness.

    Raises:
      UserError: on a wrong dtype, fewer than 2 images, or a tolerance known to be not positive or not finite.
    """
    check_positive("tolerance", tolerance)
    array = _some_images("images", images)
    distances = euclidean_distances(array, array) / math.sqrt(array[0].size)
    nearest = jnp.where(jnp.eye(len(array), dtype=bool), jnp.inf, distances).min(1)
    return jnp.where(jnp.isnan(array).any(), jnp.nan, (nearest <= tolerance).mean())


def saturation(images: Float[Tensor, " batch *image"], *, tolerance: Scalar = 0.01) -> Float[Array, ""]:
    """The share of values at the more frequent end of [-1, 1], where tanh has no slope left.

        max( mean [x <= -1 + tolerance], mean [x >= 1 - tolerance] )    in [0, 1]

    Compare with real images, whose background may be black. NaN if a value is.

    Args:
      images: about [-1, 1].
      tolerance: > 0.

    Raises:
      UserError: on a wrong dtype, no images, or a tolerance known to be not positive or not finite.
    """
    check_positive("tolerance", tolerance)
    array = some_batch("images", images)
    share = jnp.maximum((array <= -1 + tolerance).mean(), (array >= 1 - tolerance).mean())
    return jnp.where(jnp.isnan(array).any(), jnp.nan, share)


def verdict(
    *,
    diversity: Scalar | None = None,
    duplicates: Scalar | None = None,
    separation: Scalar | None = None,
    saturation: Scalar | None = None,
    min_diversity: float = 0.1,
    max_duplicates: float = 0.5,
    max_separation: float = 0.99,
    max_saturation: float = 0.99,
) -> str | None:
    """What the numbers of this module say is wrong, in plain text, or None; on the host.

    Args:
      diversity: of `diversity_ratio`; None, as for the others, where it was not measured.
      duplicates: of `duplicates`.
      separation: of `logit_separation`.
      saturation: of `saturation`.
      min_diversity: below it, the generator has collapsed.
      max_duplicates: above it, the generator has collapsed.
      max_separation: above it, the discriminator has won.
      max_saturation: above it, the generated images are saturated.
    """
    collapsed = "the generator has collapsed to few images"
    measured = (
        ("diversity ratio", diversity, min_diversity, -1, collapsed),
        ("share of duplicates", duplicates, max_duplicates, 1, collapsed),
        ("logit separation", separation, max_separation, 1, "the discriminator has won and teaches nothing any more"),
        ("saturation", saturation, max_saturation, 1, "the generated images are saturated at one value"),
    )
    found = []
    for name, value, limit, sign, meaning in measured:
        if value is None:
            continue
        number = float(np.asarray(value))
        if math.isnan(number):
            found.append(f"{name} is NaN: training has diverged, or what was measured is not defined")
        elif sign * number > sign * limit:
            found.append(
                f"{meaning} ({name} {number:.3g}, {'at least' if sign < 0 else 'at most'} {limit:.3g} is sound)"
            )
    return "; ".join(found) or None
