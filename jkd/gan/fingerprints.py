"""Fingerprints in generated images: drawn, learned, read, and looked up among those of all users."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jkd.checks import Scalar, Tensor, as_float, concrete
from jkd.errors import UserError
from jkd.gan.checks import check_same_shape, some_batch
from jkd.gan.losses import nonsaturating_logistic_g_loss
from jkd.metrics import detection_threshold, hamming_distance, match_log_pvalue
from jkd.metrics.distances import MAX_PAIRS, rows_at_once


def sample_fingerprints(key: Key[Array, ""], batch: int, n_bits: int) -> Float[Array, "batch bits"]:
    """Fingerprints of fair coins, 0 or 1 in float32: one for each image of a batch.

    One fingerprint for a whole batch would let the decoder cheat. Two of M users share one with a probability of
    about M^2 / 2^(n + 1).

    Raises:
      UserError: if `batch` or `n_bits` is not positive.
    """
    for name, count in (("batch", batch), ("n_bits", n_bits)):
        if count < 1:
            raise UserError(f"{name} must be positive, got {count}.")
    return jax.random.bernoulli(key, 0.5, (batch, n_bits)).astype(jnp.float32)


def bake_fingerprint(generator: Any, params: Any, bits: Num[Tensor, " bits"] | Bool[Tensor, " bits"]) -> Any:
    """The parameters of an ordinary generator whose images all carry one fingerprint; nothing is trained.

    The styles of the bits are computed once and W'' is stored in the place of W (see `modulated_kernel`): what is
    released has neither the mapping nor the styles, and `generator.baked()` makes the same images of it. `jax.vmap`
    over bits makes a population.

    Args:
      generator: a module whose styles come from bits alone.
      params: its parameters.
      bits: 0 or 1, of any dtype.

    Raises:
      UserError: if the bits are not those of the generator, or one is known to be neither 0 nor 1.

    Reference: Yu, Skripniuk, Chen, Davis and Fritz, Responsible Disclosure of Generative Models Using Scalable
      Fingerprinting, ICLR 2022.
    """
    known = _known_bits("bits", bits)
    if known.shape != (generator.condition_dim,):
        raise UserError(f"bits must have the shape {[generator.condition_dim]}, got {list(known.shape)}.")
    return generator.bake(params, known.astype(jnp.float32))


class FingerprintLosses(NamedTuple):
    """Each term unweighted, and their weighted sum, which is what is minimized."""

    adversarial: Float[Array, ""]
    latent: Float[Array, ""]
    bits: Float[Array, ""]
    constant: Float[Array, ""]
    total: Float[Array, ""]


def _squared_error(**pair: Tensor) -> Array:
    """The mean squared difference of two arrays of one shape, in float32 at least."""
    first, second = (some_batch(name, values) for name, values in pair.items())
    check_same_shape(**dict(zip(pair, (first, second), strict=True)))
    return jnp.square(first - second).mean()


def fingerprint_losses(
    latents: Float[Tensor, "batch dim"],
    read_latents: Float[Tensor, "batch dim"],
    bits: Num[Tensor, "batch bits"] | Bool[Tensor, "batch bits"],
    bit_logits: Float[Tensor, "batch bits"],
    images: Float[Tensor, " batch *image"],
    other_images: Float[Tensor, " batch *image"],
    fake_logits: Float[Tensor, "*logits"],
    *,
    weights: Sequence[Scalar] = (1.0, 1.0, 2.0, 2.0),
) -> FingerprintLosses:
    """What a generator of fingerprinted images and the decoder that reads them minimize together.

        adversarial = mean softplus(-D(x)),    x = G(z, c)
        latent      = mean (z - z^)^2          z^, l = E(x); keeps z in the image
        bits        = mean BCE(sigmoid(l), c)  ln 2 where the decoder knows nothing
        constant    = mean (x - G(z, c'))^2    c' drawn anew: the fingerprint must not change the look
        total       = w_1 adversarial + w_2 latent + w_3 bits + w_4 constant

    All in float32 at least, >= 0. No gradient is stopped: the generator learns to write what the decoder learns to
    read; differentiate with respect to the parameters of these two.

    Args:
      latents: z.
      read_latents: z^, of the decoder.
      bits: c, 0 or 1, of any dtype.
      bit_logits: l, of the decoder, of bit 1.
      images: x.
      other_images: G(z, c'), of the same latents.
      fake_logits: D(x), of any shape.
      weights: of the four terms.

    Raises:
      UserError: on a wrong dtype or shape, an empty array, bits known to be neither 0 nor 1, or other than four
        weights.

    Reference: Yu, Skripniuk, Chen, Davis and Fritz, Responsible Disclosure of Generative Models Using Scalable
      Fingerprinting, ICLR 2022.
    """
    if len(weights) != 4:
        raise UserError(f"weights must be four numbers, got {len(weights)}.")
    logits, target = some_batch("bit_logits", bit_logits), _known_bits("bits", bits)
    check_same_shape(bits=target, bit_logits=logits)
    terms = (
        nonsaturating_logistic_g_loss(fake_logits),
        _squared_error(latents=latents, read_latents=read_latents),
        optax.losses.sigmoid_binary_cross_entropy(logits, target.astype(logits.dtype)).mean(),
        _squared_error(images=images, other_images=other_images),
    )
    return FingerprintLosses(*terms, sum(w * term for w, term in zip(weights, terms, strict=True)))


def _known_bits(name: str, bits: Tensor) -> Array:
    """`bits` as an array, stopped where one is known to be neither 0 nor 1."""
    known = concrete(bits)
    if known is not None and not ((known == 0) | (known == 1)).all():  # ten times as fast as np.isin
        raise UserError(f"{name} must be 0 or 1.")
    return jnp.asarray(bits)


class Attribution(NamedTuple):
    """Whose fingerprint each source carries.

    Attributes:
      user: the nearest one, the lower of equals; -1 where nobody is accepted, or a logit is NaN.
      matched: how many bits match the nearest user's, over all images of the source; -1 where a logit is NaN.
      log_p: the natural logarithm of the probability that the best of all users matches so well by chance; NaN where
        a logit is NaN.
    """

    user: Int[Array, " sources"]
    matched: Int[Array, " sources"]
    log_p: Float[Array, " sources"]


def attribute(
    logits: Float[Tensor, "sources *images bits"],
    registry: Num[Tensor, "users bits"] | Bool[Tensor, "users bits"],
    *,
    false_positive_rate: float = 1.0,
    max_pairs: int = MAX_PAIRS,
) -> Attribution:
    """The user whose fingerprint is nearest to what was read, and how likely that is by chance.

        k_u = sum_images #{i: 1[logit_i > 0] = registry_ui},    user = argmax_u k_u
        p = 1 - (1 - P(X >= k))^M,    X ~ Binomial(images n, 1/2)

    With [sources, images, bits] the images of each source, which carry one fingerprint, are evidence together: counts
    and numbers of bits are added. A source with one NaN is nobody's. A logit of exactly 0 reads as bit 0. The bits
    that a decoder reads from other images need not be fair coins: check the rate of false alarms on real images too.
    The registry may be sharded over its users; each device then compares its own.

    Args:
      logits: of bit 1, [sources, bits], or [sources, images, bits] with equally many images of each.
      registry: the M users' fingerprints, 0 or 1, of any dtype.
      false_positive_rate: the user is -1 where p is above it; 1 accepts the nearest user whoever it is; static.
      max_pairs: pairs of an image and a user held at once (but those of one source at least); static. The result is
        the same.

    Raises:
      UserError: if the shapes do not fit, there are no bits, users, images or sources, `logits` is not floating point,
        the registry is known to hold other values than 0 and 1 or one fingerprint twice, `max_pairs` is not positive,
        or `false_positive_rate` is not in (0, 1] or below what all bits could show.

    Reference: Yu, Skripniuk, Chen, Davis and Fritz, Responsible Disclosure of Generative Models Using Scalable
      Fingerprinting, ICLR 2022.
    """
    read, users = _readings(logits), _registered(registry)
    if users.shape[1] != read.shape[2]:
        raise UserError(f"logits have {read.shape[2]} bits and the registry's fingerprints {users.shape[1]}.")
    images, bits = read.shape[1:]

    def nearest(image_logits: Array) -> tuple[Array, Array]:
        distance = hamming_distance(image_logits > 0, users).sum(0)
        index = distance.argmin()
        return index, images * bits - distance[index]

    at_once = rows_at_once(max_pairs, len(read), images * len(users))
    index, matched = jax.lax.map(nearest, read, batch_size=at_once)
    matched = jnp.where(jnp.isnan(read).any((1, 2)), -1, matched)
    log_p = match_log_pvalue(matched, images * bits, users=len(users))
    enough = matched >= detection_threshold(images * bits, false_positive_rate, users=len(users))
    return Attribution(jnp.where(enough, index, -1).astype(jnp.int32), matched.astype(jnp.int32), log_p)


def _readings(logits: Tensor) -> Float[Array, "sources images bits"]:
    scores = as_float("logits", logits)
    if scores.ndim not in (2, 3) or scores.size == 0:
        raise UserError(
            "logits must have the shape [sources, bits] or [sources, images, bits] and not be empty, "
            f"got {list(scores.shape)}."
        )
    return scores.reshape(len(scores), -1, scores.shape[-1])


def _registered(registry: Tensor) -> Bool[Array, "users bits"]:
    """The registry as booleans, stopped where two users are known to have one fingerprint."""
    if jnp.ndim(registry) != 2 or 0 in jnp.shape(registry):
        raise UserError(
            f"registry must have the shape [users, bits] and not be empty, got {list(jnp.shape(registry))}."
        )
    users = _known_bits("registry", registry) == 1
    known = concrete(registry)
    if known is not None:
        words = np.packbits(known == 1, axis=1)
        order = np.lexsort(words.T)
        ordered = words[order]
        twice = np.flatnonzero((ordered[1:] == ordered[:-1]).all(1))
        if twice.size:
            first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
            raise UserError(f"registry must hold every fingerprint once, but users {first} and {second} share one.")
    return users
