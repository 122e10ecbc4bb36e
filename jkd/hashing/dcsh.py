"""Binary codes that the anchor graphs of several modalities agree on, by alternating optimization.

The objective and the updates are an instance of the method's idea, spectral embedding with one binary code for all
modalities, and not the paper's own equations: no code of its authors is known to us.

Reference: Hoang, Do, Nguyen and Cheung, Unsupervised Deep Cross-modality Spectral Hashing, IEEE Transactions on Image
  Processing 29, 2020.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from jkd.checks import Scalar, Tensor, concrete
from jkd.errors import UserError
from jkd.hashing.baselines import fix_signs, itq_rotation
from jkd.hashing.codes import to_signs
from jkd.hashing.spectral import (
    Embedding,
    Factor,
    centered,
    centered_gram,
    centered_times,
    centered_transposed_times,
    check_factor,
    left_singular,
    orthonormal,
    product,
    spectral_embedding,
)
from jkd.linalg import eigh

ALPHA, RHO, INNER, ITQ_ITERS = 1.0, 0.1, 5, 50
Codes = Num[Tensor, "rows bits"]


class DCSHState(NamedTuple):
    """What the alternating optimization updates.

    Attributes:
      views: V_m of each modality, orthonormal columns that sum to 0.
      eigenvalues: sigma_m^2 of each modality: of A_m, and after an update of A_m + alpha / (n L) B B^T.
      codes: B, -1 and 1.
      targets: Y, with Y^T Y = n I and columns that sum to 0.
    """

    views: tuple[Float[Array, "rows bits"], ...]
    eigenvalues: tuple[Float[Array, " bits"], ...]
    codes: Int[Array, "rows bits"]
    targets: Float[Array, "rows bits"]


class BinaryCodes(NamedTuple):
    """The result of `fit_binary_codes`: V_m, B and Y as in `DCSHState`, and the objective.

    Attributes:
      views: V_m of each modality.
      codes: B, int8, -1 and 1.
      targets: Y.
      trace: J at the start and after each round.
    """

    views: tuple[Float[Array, "rows bits"], ...]
    codes: Int[Array, "rows bits"]
    targets: Float[Array, "rows bits"]
    trace: Float[Array, " rounds"]


def _signs(codes: Codes, like: Array | None = None) -> Array:
    """Codes as numbers."""
    known = concrete(codes)
    if jnp.ndim(codes) != 2 or (known is not None and not np.isin(known, (-1, 1)).all()):
        raise UserError(f"codes must be -1 and 1 of the shape [rows, bits], got the shape {list(jnp.shape(codes))}.")
    return jnp.asarray(codes).astype(jnp.float32 if like is None else like.dtype)


def update_v(
    key: Key[Array, ""],
    factor: Factor,
    codes: Codes,
    *,
    alpha: Scalar = ALPHA,
    gram: Float[Array, "anchors anchors"] | None = None,
) -> Embedding:
    """The V that maximizes the objective for given codes, and its singular values sigma.

        the leading left singular vectors of M = [C H, sqrt(alpha / (n L)) C B]

    by eigh of M^T M. So sigma^2 are eigenvalues of C (A + alpha / (n L) B B^T) C.

    Args:
      key: draws what completes V where the rank of M is below the number of bits.
      factor: H of `graph_factor`; it is centered here.
      codes: B, -1 and 1.
      alpha: >= 0, how much the codes pull.
      gram: H^T C H where it is known.

    Raises:
      UserError: for factors that `spectral_embedding` refuses, or codes known to be neither -1 nor 1.
    """
    bits = jnp.shape(codes)[1]
    factor = check_factor(factor, bits)
    gram = centered_gram(factor) if gram is None else gram
    anchors, signs = len(gram), _signs(codes, gram)
    weight = jnp.sqrt(jnp.asarray(alpha, gram.dtype) / signs.size)
    pulled = weight * centered(signs)
    across = centered_transposed_times(factor, pulled)
    whole = jnp.block([[gram, across], [across.T, product(pulled.T, pulled)]])

    def times(right: Array) -> Array:
        return centered_times(factor, right[:anchors]) + product(pulled, right[anchors:])

    return left_singular(key, whole, times, bits)


def update_b(
    codes: Codes,
    views: Sequence[Float[Tensor, "rows bits"]],
    targets: Float[Tensor, "rows bits"],
    *,
    alpha: Scalar = ALPHA,
    rho: Scalar = RHO,
    eigenvalues: Sequence[Float[Tensor, " bits"]] | None = None,
    inner: int = INNER,
) -> Int[Array, "rows bits"]:
    """Codes that lower the objective nowhere: repeatedly the signs of its gradient, int8.

        G = 2 alpha / (n L) sum_m V_m V_m^T B + 2 rho / n Y,      B <- sign(G)

    Entries with G = 0 keep their value. With `eigenvalues` trailing, noisy directions count less:

        G = 2 sum_m V_m diag(sigma_m^2) V_m^T B + 2 rho Y

    The objective is convex in B, so no step lowers it. A NaN keeps the old value: look at the objective.

    Args:
      codes: B, -1 and 1.
      views: V_m.
      targets: Y.
      alpha: >= 0; of the first form only.
      rho: >= 0, how much the bits are drawn to balance and independence.
      eigenvalues: sigma_m^2 for the second form.
      inner: steps; static.

    Raises:
      UserError: if codes are known to be neither -1 nor 1.
    """
    start, spans = _signs(codes, jnp.asarray(targets)), [jnp.asarray(view) for view in views]
    scales = _scales(spans, eigenvalues, alpha, start)
    pull = jnp.asarray(rho, start.dtype) / len(start) * jnp.asarray(targets)

    def step(_: Array | int, signs: Array) -> Array:
        gradient = pull
        for view, scale in zip(spans, scales, strict=True):
            gradient = gradient + product(view, scale[:, None] * product(view.T, signs))
        return jnp.where(gradient > 0, 1, jnp.where(gradient < 0, -1, signs)).astype(signs.dtype)

    return jax.lax.fori_loop(0, inner, step, start).astype(jnp.int8)


def _scales(views: Sequence, eigenvalues: Sequence | None, alpha: Scalar, signs: Array) -> list[Array]:
    """What each direction of each view counts in the code term of the objective, which is |scale^(1/2) V^T B|^2."""
    if eigenvalues is not None:
        return [jnp.asarray(values) / len(signs) for values in eigenvalues]
    return [jnp.full(signs.shape[1], jnp.asarray(alpha, signs.dtype) / signs.size) for _ in views]


def update_y(
    key: Key[Array, ""], codes: Codes, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "rows bits"]:
    """The balanced, uncorrelated Y nearest to the codes: it maximizes tr(Y^T B) for Y^T Y = n I, Y^T 1 = 0.

        C B = P S Q^T,    Y = sqrt(n) P Q^T

    by eigh of B^T C B. Where C B has not full rank (constant bits, copies of bits), random vectors orthogonal to P and
    to 1 complete P.

    Args:
      key: draws them.
      codes: B, -1 and 1.
      dtype: of the result.

    Raises:
      UserError: if codes are known to be neither -1 nor 1, or there are not more rows than bits.
    """
    signs = _signs(codes).astype(dtype)
    rows, bits = signs.shape
    if rows < bits + 1:
        raise UserError(f"{bits} bits need at least {bits + 1} rows, got {rows}.")
    middle = centered(signs)
    values, right = eigh(product(middle.T, middle))
    rounding = 10 * bits * jnp.finfo(signs.dtype).eps
    sound = values > rounding * rows * bits
    left = product(middle, right / jnp.sqrt(jnp.where(sound, values, 1))[None])
    return jnp.sqrt(jnp.asarray(rows, signs.dtype)) * product(orthonormal(key, left, sound), right.T)


def dcsh_objective(
    factors: Sequence[Factor],
    views: Sequence[Float[Tensor, "rows bits"]],
    codes: Codes,
    targets: Float[Tensor, "rows bits"],
    *,
    alpha: Scalar = ALPHA,
    rho: Scalar = RHO,
    eigenvalues: Sequence[Float[Tensor, " bits"]] | None = None,
) -> Float[Array, ""]:
    """What `fit_binary_codes` maximizes over V_m with V_m^T V_m = I, V_m^T 1 = 0, B in {-1, 1} and Y as in `update_y`.

        J = sum_m [ tr(V_m^T A_m V_m) + alpha / (n L) |V_m^T B|^2 ] + 2 rho / n tr(Y^T B)

    tr(V^T A V) <= L is the spectral embedding of a modality, |V^T B|^2 <= n L how much of the codes lies in its span,
    and the last term draws bits to balance and independence. With `eigenvalues` the second term is
    1/n |diag(sigma_m) V_m^T B|^2: the objective that the weighted form of `update_b` raises, while `update_v` need
    not. It does not change where V_m is rotated (without `eigenvalues`), and where columns of B and Y are permuted or
    flipped together.

    Args:
      factors: H_m; they are centered here.
      views: V_m.
      codes: B, -1 and 1.
      targets: Y.
      alpha: >= 0.
      rho: >= 0.
      eigenvalues: sigma_m^2 for the weighted form.

    Raises:
      UserError: if codes are known to be neither -1 nor 1, or the numbers of factors and views differ.
    """
    if len(factors) != len(views):
        raise UserError(f"factors and views must be equally many, got {len(factors)} and {len(views)}.")
    signs = _signs(codes, jnp.asarray(targets))
    total = 2 * jnp.asarray(rho, signs.dtype) / len(signs) * (targets * signs).sum()
    for factor, view, scale in zip(factors, views, _scales(views, eigenvalues, alpha, signs), strict=True):
        total = total + jnp.square(centered_transposed_times(factor, jnp.asarray(view))).sum()
        total = total + (scale[:, None] * jnp.square(product(jnp.asarray(view).T, signs))).sum()
    return total


def initial_codes(
    key: Key[Array, ""], factors: Sequence[Factor], bits: int, *, itq_iters: int = ITQ_ITERS
) -> DCSHState:
    """Where the alternating optimization starts: the modalities' embeddings, joined and rotated towards their signs.

        V_m, sigma_m of each factor;  U, tau of [V_1 diag(sigma_1), V_2 diag(sigma_2), ..];  B = sign(U diag(tau^2) R)

    with the R of `itq_rotation`. A single factor gives the codes of one modality.

    Args:
      key: draws the start of R, and what completes matrices of low rank.
      factors: H_m of `graph_factor`, with the same rows.
      bits: L; static.
      itq_iters: rounds for R; static.

    Raises:
      UserError: if there is no factor, they differ in rows, or for one that `spectral_embedding` refuses.
    """
    factors = _checked(factors, bits)
    keys = jax.random.split(key, len(factors) + 3)
    found = [spectral_embedding(factor, bits, key=k) for factor, k in zip(factors, keys, strict=False)]
    joined = jnp.concatenate([vectors * singular[None] for vectors, singular in found], axis=1)
    common, tau = left_singular(
        keys[-3], product(joined.T, joined), lambda right: centered(product(joined, right)), bits
    )
    scores = jnp.sqrt(jnp.asarray(len(common), common.dtype)) * fix_signs(common) * jnp.square(tau)[None]
    codes = to_signs(product(scores, itq_rotation(keys[-2], scores, itq_iters)))
    targets = update_y(keys[-1], codes, dtype=common.dtype)
    return DCSHState(
        tuple(vectors for vectors, _ in found), tuple(jnp.square(each.singular) for each in found), codes, targets
    )


def _checked(factors: Sequence[Factor], bits: int) -> list:
    if not len(factors):
        raise UserError("factors must hold at least one modality.")
    checked = [check_factor(factor, bits) for factor in factors]
    if len({factor.shape[0] for factor in checked}) > 1:
        raise UserError(f"factors must have equally many rows, got {[factor.shape[0] for factor in checked]}.")
    return checked


def refine_codes(
    key: Key[Array, ""],
    factors: Sequence[Factor],
    state: DCSHState,
    *,
    alpha: Scalar = ALPHA,
    rho: Scalar = RHO,
    inner: int = INNER,
    weight_eigs: bool = True,
    grams: Sequence[Float[Array, "anchors anchors"]] | None = None,
) -> DCSHState:
    """One round: `update_v` of each modality, `update_b`, `update_y`.

    Takes what `fit_binary_codes` does; `grams` are H_m^T C H_m where they are known. Unless `weight_eigs`, no round
    lowers `dcsh_objective`.
    """
    keys = jax.random.split(key, len(factors) + 1)
    known: Sequence = grams or [None] * len(factors)
    found = [
        update_v(k, factor, state.codes, alpha=alpha, gram=gram)
        for k, factor, gram in zip(keys, factors, known, strict=False)
    ]
    views = tuple(vectors for vectors, _ in found)
    eigenvalues = tuple(jnp.square(each.singular) for each in found)
    weights = eigenvalues if weight_eigs else None
    codes = update_b(state.codes, views, state.targets, alpha=alpha, rho=rho, eigenvalues=weights, inner=inner)
    return DCSHState(views, eigenvalues, codes, update_y(keys[-1], codes, dtype=state.targets.dtype))


def objective_of(
    factors: Sequence[Factor], state: DCSHState, *, alpha: Scalar = ALPHA, rho: Scalar = RHO, weight_eigs: bool = True
) -> Float[Array, ""]:
    """`dcsh_objective` of a state."""
    weights = state.eigenvalues if weight_eigs else None
    return dcsh_objective(factors, state.views, state.codes, state.targets, alpha=alpha, rho=rho, eigenvalues=weights)


def fit_binary_codes(
    key: Key[Array, ""],
    factors: Sequence[Factor],
    bits: int,
    *,
    alpha: Scalar = ALPHA,
    rho: Scalar = RHO,
    iters: int = 10,
    inner: int = INNER,
    itq_iters: int = ITQ_ITERS,
    weight_eigs: bool = True,
) -> BinaryCodes:
    """One binary code for the rows that all modalities share, from their anchor graphs.

    `initial_codes`, then `iters` times `refine_codes`: each update maximizes `dcsh_objective` over one of V_m, B and
    Y, so that without `weight_eigs` the trace never falls. Memory and time are those of rows x anchors; rows may be
    sharded. Trace and codes are of the dtype of the factors, float32 at least; a traced NaN shows in the trace.

    Args:
      key: draws the start of the rotation, and what completes matrices of low rank.
      factors: H_m of `graph_factor`, with the same rows.
      bits: L; fewer than rows and than anchors with neighbors; static.
      alpha: >= 0, how much codes and embeddings pull at each other.
      rho: >= 0, how much the bits are drawn to balance and independence: small values leave bits that are copies of
        each other, large ones a random orthogonal code.
      iters: static; 0 gives the initial codes.
      inner: steps of `update_b` a round; static.
      itq_iters: static.
      weight_eigs: whether directions count by their eigenvalues (see `update_b`); static.

    Raises:
      UserError: if there is no factor, they differ in rows, one has too few rows or anchors for the bits or is known
        not to be finite, `alpha` or `rho` is known to be negative or NaN, or `iters` is negative.

    Reference: see the module.
    """
    for name, value in (("alpha", alpha), ("rho", rho), ("iters", iters), ("inner", inner)):
        known = concrete(value)
        if known is not None and not (np.isfinite(known) & (known >= 0)).all():
            raise UserError(f"{name} must be finite and >= 0, got {value}.")
    checked = _checked(factors, bits)
    grams = [centered_gram(factor) for factor in checked]
    start_key, round_key = jax.random.split(key)
    weights: dict = {"alpha": alpha, "rho": rho, "weight_eigs": weight_eigs}

    def one_round(state: DCSHState, t: Array) -> tuple[DCSHState, Array]:
        state = refine_codes(jax.random.fold_in(round_key, t), checked, state, inner=inner, grams=grams, **weights)
        return state, objective_of(checked, state, **weights)

    start = initial_codes(start_key, checked, bits, itq_iters=itq_iters)
    state, trace = jax.lax.scan(one_round, start, jnp.arange(iters))
    trace = jnp.concatenate([objective_of(checked, start, **weights)[None], trace])
    return BinaryCodes(state.views, state.codes, state.targets, trace)


def max_bit_correlation(codes: Codes) -> Float[Array, ""]:
    """The largest |b_i . b_j| / n of two different bits, in [0, 1]: 1 where one is a copy of the other; float32.

    Raises:
      UserError: if codes are known to be neither -1 nor 1.
    """
    signs = _signs(codes)
    overlap = jnp.abs(product(signs.T, signs)) / len(signs)
    return jnp.where(jnp.eye(len(overlap), dtype=bool), 0, overlap).max()
