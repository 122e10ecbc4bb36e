"""Codes as independent Bernoulli bits: their probabilities, draws that carry gradients, and how far two differ.

Logits are clipped to [-LIMIT, LIMIT] wherever they become probabilities: logarithms and gradients stay finite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jkd.checks import Scalar, Tensor, as_float, check_positive
from jkd.errors import UserError, unknown
from jkd.reduction import reduce

LIMIT = 15.0
ESTIMATORS = ("straight_through", "relaxed")
GAPS = ("mse", "kl")

Logits = Float[Tensor, "*rows bits"]


def clip_logits(logits: Logits) -> Float[Array, "*rows bits"]:
    """Logits in [-15, 15], float32 at least; no gradient where they were outside. NaN stays NaN.

    Raises:
      UserError: if they are not floating point.
    """
    return jnp.clip(as_float("logits", logits), -LIMIT, LIMIT)


def bit_probabilities(logits: Logits) -> Float[Array, "*rows bits"]:
    """The probability of each bit, q = sigmoid(logits), of clipped ones: in (0, 1)."""
    return jax.nn.sigmoid(clip_logits(logits))


def sample_bits_st(key: Key[Array, ""], logits: Logits) -> Float[Array, "*rows bits"]:
    """Draws b = 1[u < q], u ~ U(0, 1), q = sigmoid(logits); the gradient is that of q (straight-through).

    The values are 0 and 1 (NaN where a logit is).

    Reference: Bengio, Leonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation, 2013.
    """
    q = bit_probabilities(logits)
    drawn = (jax.random.uniform(key, q.shape, q.dtype) < q).astype(q.dtype)
    return drawn + (q - jax.lax.stop_gradient(q))


def sample_bits_relaxed(key: Key[Array, ""], logits: Logits, temperature: Scalar = 0.5) -> Float[Array, "*rows bits"]:
    """Draws b = sigmoid((logits + log u - log(1 - u)) / temperature), u ~ U(0, 1): binary Concrete, in [0, 1].

    The share of draws above 1/2 is q at any temperature; the lower it is, the nearer they lie to 0 and 1, and the
    larger the variance of gradients. Nothing is stopped.

    Raises:
      UserError: if `temperature` is known not to be positive.

    Reference: Maddison, Mnih and Teh, The Concrete Distribution, ICLR 2017; Jang, Gu and Poole, Categorical
    Reparameterization with Gumbel-Softmax, ICLR 2017.
    """
    check_positive("temperature", temperature)
    clipped = clip_logits(logits)
    noise = jax.random.logistic(key, clipped.shape, clipped.dtype)
    return jax.nn.sigmoid((clipped + noise) / temperature)


def concrete_temperature(t: Scalar, num_steps: int, start: float = 0.5, end: float = 0.1) -> Float[Array, ""]:
    """The temperature at step t of `num_steps`: start (end / start)^(t / num_steps), and `end` from there on.

    Raises:
      UserError: if a temperature or `num_steps` is not positive.
    """
    for name, value in (("start", start), ("end", end), ("num_steps", num_steps)):
        check_positive(name, value)
    share = jnp.clip(jnp.asarray(t, jnp.float32) / num_steps, 0, 1)
    return jnp.asarray(start * (end / start) ** share)


def sample_bits(
    key: Key[Array, ""],
    logits: Float[Tensor, "rows bits"],
    *,
    estimator: str = "straight_through",
    num_samples: int = 1,
    temperature: Scalar = 0.5,
) -> Float[Array, "samples rows bits"]:
    """Independent draws of every code by one of the estimators.

    Args:
      key: of all draws.
      logits: of q.
      estimator: "straight_through" or "relaxed".
      num_samples: at least 1; more lower the variance of what is averaged over them.
      temperature: of "relaxed".

    Raises:
      UserError: for another estimator, fewer than 1 sample, or a temperature known not to be positive.
    """
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}.")
    repeated = jnp.broadcast_to(jnp.asarray(logits)[None], (num_samples, *jnp.shape(logits)))
    if estimator == "relaxed":
        return sample_bits_relaxed(key, repeated, temperature)
    return sample_bits_st(key, repeated)


def bernoulli_kl(first: Float[Tensor, "*rows bits"], second: Float[Tensor, "*rows bits"]) -> Float[Array, "*rows"]:
    """KL divergences of codes: sum_k p_k log(p_k / q_k) + (1 - p_k) log((1 - p_k) / (1 - q_k)), in nats.

    Probabilities are kept away from 0 and 1 by those of the logits -15 and 15: finite values and gradients.

    Raises:
      UserError: if they are not floating point, or of different shapes.
    """
    p, q = _two_probabilities(first, second)
    terms = p * (jnp.log(p) - jnp.log(q)) + (1 - p) * (jnp.log1p(-p) - jnp.log1p(-q))
    return terms.sum(-1)


def modality_gap(
    first: Float[Tensor, "batch bits"],
    second: Float[Tensor, "batch bits"],
    *,
    kind: str = "mse",
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """How far the codes of the two sides of each pair are apart, from the probabilities p and q of their bits.

        "mse"   1 / L sum_k (p_k - q_k)^2
        "kl"    (KL(p | q) + KL(q | p)) / 2, summed over the L bits; nats

    Args:
      first: p.
      second: q.
      kind: "mse" or "kl".
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: for another kind or reduction, a wrong dtype, or different shapes.
    """
    if kind not in GAPS:
        raise unknown("kind of gap", kind, GAPS)
    if kind == "kl":
        return reduce((bernoulli_kl(first, second) + bernoulli_kl(second, first)) / 2, reduction)
    p, q = _two_probabilities(first, second)
    return reduce(jnp.square(p - q).mean(-1), reduction)


def bit_information(probabilities: Float[Tensor, "batch bits"]) -> Float[Array, ""]:
    """How balanced and sure bits are: sum_k [H(mean_i q_ik) - mean_i H(q_ik)], H the entropy of a bit, in nats.

    At least the mutual information of codes and rows (rows uniform over this batch), since it takes bits for
    independent: a regularizer, no estimate of it. At most L log 2. The means are over the whole (global) batch.

    Raises:
      UserError: if the probabilities are not floating point, or there is no row.
    """
    q = as_probabilities("probabilities", probabilities)
    if q.ndim != 2 or not len(q):
        raise UserError(f"probabilities must have the shape [batch, bits] with rows, got {list(q.shape)}.")
    return (_entropy(q.mean(0)) - _entropy(q).mean(0)).sum()


def _entropy(q: Array) -> Array:
    return -(q * jnp.log(q) + (1 - q) * jnp.log1p(-q))


def as_probabilities(name: str, values: Float[Tensor, "*rows bits"]) -> Float[Array, "*rows bits"]:
    """Probabilities that lie as far from 0 and 1 as those of clipped logits, float32 at least."""
    array = as_float(name, values)
    low = jax.nn.sigmoid(jnp.asarray(-LIMIT, array.dtype))
    return jnp.clip(array, low, 1 - low)


def _two_probabilities(first: Tensor, second: Tensor) -> tuple[Array, Array]:
    p, q = as_probabilities("first", first), as_probabilities("second", second)
    if p.shape != q.shape:
        raise UserError(f"first and second must be of one shape, got {list(p.shape)} and {list(q.shape)}.")
    return p, q


Bits = Float[Tensor, "*rows bits"] | Bool[Tensor, "*rows bits"]


def as_bits(bits: Bits) -> Float[Array, "*rows bits"]:
    """Bits 0 and 1, or what relaxes them, as floating point; booleans become float32."""
    return as_float("bits", bits.astype(jnp.float32) if bits.dtype == jnp.bool_ else bits)
