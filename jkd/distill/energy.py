"""Distillation whose temperature follows the energy of the teacher's logits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from jkd.checks import Scalar, Tensor, as_float, check_positive, concrete
from jkd.distill.checks import logit_pair
from jkd.distill.losses import cross_entropy, dkd_terms, kd_loss
from jkd.errors import UserError
from jkd.reduction import reduce


def energy_score(logits: Float[Tensor, "*batch classes"], temperature: Scalar = 4.0) -> Float[Array, "*batch"]:
    """The energy of logits: the lower, the more certain the classifier.

        E = -T logsumexp(z / T),    -max z - T ln K <= E <= -max z,    dE/dz = -softmax(z / T)

    In the unit of the logits, usually negative; float32 at least.

    Args:
      logits: raw logits; the last axis holds the K classes. Gradients pass through them.
      temperature: T > 0, in the unit of the logits; apart from any distillation temperature.

    Raises:
      UserError: if the logits are not floating point, or the temperature is known to be <= 0 or not finite.

    Reference: Liu, Wang, Owens and Li, Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    check_positive("temperature", temperature)
    logits = as_float("logits", logits)
    t = jnp.asarray(temperature, logits.dtype)
    return -t * logsumexp(logits / t, axis=-1)


class EnergyThresholds(NamedTuple):
    """Energies below `low` are the certain group, energies above `high` the uncertain one."""

    low: Float[Array, ""]
    high: Float[Array, ""]


def _check_rates(low_rate: float, high_rate: float) -> None:
    for name, rate in (("low_rate", low_rate), ("high_rate", high_rate)):
        if not 0 <= rate <= 1:
            raise UserError(f"{name} must lie in [0, 1], got {rate}.")
    # 0.7 + 0.3 is exactly 1.0, but 0.9 + 0.1 may be rounded up: allow the rounding, nothing more.
    if low_rate + high_rate > 1 + 1e-9:
        raise UserError(f"low_rate + high_rate must be at most 1, got {low_rate} + {high_rate}.")


def energy_thresholds(energies: Float[Tensor, " examples"], low_rate: float, high_rate: float) -> EnergyThresholds:
    """The two energies that cut off the most certain and the most uncertain part of a training set.

        e_low = e_(n_low),    e_high = e_(N - 1 - n_high),    n = int(N rate),    e_(0) <= ... <= e_(N - 1)

    Without ties exactly n_low energies are < e_low and exactly n_high are > e_high. A rate of 1 takes all:
    its threshold is then infinite. Where n_low + n_high = N, e_low > e_high. In float32 at least; gradients pass to
    the two energies that are taken.

    Args:
      energies: of the teacher over the training set, seen as in training (the same augmentation).
      low_rate: share of the examples in the low-energy group, in [0, 1]; static.
      high_rate: share of the examples in the high-energy group, in [0, 1]; static.

    Raises:
      UserError: if a rate is outside [0, 1], their sum is over 1, there are no energies, or an energy known
        here is not finite. Traced energies that are not finite make both thresholds NaN.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024.
    """
    _check_rates(low_rate, high_rate)
    values = as_float("energies", energies)
    if values.ndim != 1 or not values.size:
        raise UserError(f"energies must have the shape [examples], at least one, got {list(values.shape)}.")
    known = concrete(energies)
    if known is not None and not np.all(np.isfinite(known)):
        raise UserError(f"energies must be finite, got {np.sum(~np.isfinite(known))} NaN or infinite ones.")
    n = values.size
    # 0.29 * 100 is 28.999999999999996 in floating point and means 29.
    n_low, n_high = (math.floor(round(n * rate, 6)) for rate in (low_rate, high_rate))
    infinity = jnp.full((1,), jnp.inf, values.dtype)
    padded = jnp.concatenate([-infinity, jnp.sort(values), infinity])
    # Sorting hides a NaN at the end: let it show in both thresholds.
    padded = jnp.where(jnp.isfinite(values).all(), padded, jnp.nan)
    return EnergyThresholds(padded[1 + n_low], padded[n - n_high])


def check_threshold(name: str, value: ArrayLike) -> None:
    """Stops a threshold that is no scalar, or is NaN and known here; every comparison with it would be false."""
    if jnp.shape(value):
        raise UserError(f"{name} must be a scalar, got the shape {list(jnp.shape(value))}.")
    known = concrete(value)
    if known is not None and np.isnan(known).any():
        raise UserError(f"{name} must not be NaN.")


def energy_temperature(
    energy: Float[Tensor, " batch"],
    e_low: Scalar,
    e_high: Scalar,
    *,
    t_low: Scalar = 2.0,
    t_mid: Scalar = 4.0,
    t_high: Scalar = 6.0,
) -> Float[Array, " batch"]:
    """The distillation temperature of each example: LOW energy (certain) gets the HIGH temperature.

        T = t_high where E < e_low,    t_low where E > e_high,    t_mid elsewhere

    Both comparisons are strict, the first wins. No gradient passes. A NaN energy or threshold gives NaN.
    This is the paper's rule; the authors' published code gives certain examples T = 2 and uncertain ones T = 6, which
    is t_low=6, t_high=2 here.

    Args:
      energy: of the teacher, for the view of the image that the student sees.
      e_low: threshold of the low-energy group, from `energy_thresholds`.
      e_high: threshold of the high-energy group.
      t_low: temperature of HIGH energies, > 0.
      t_mid: temperature in between, > 0.
      t_high: temperature of LOW energies, > 0.

    Raises:
      UserError: if a temperature is known to be <= 0 or not finite, or a threshold is no scalar or known to be NaN.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024.
    """
    for name, value in (("t_low", t_low), ("t_mid", t_mid), ("t_high", t_high)):
        check_positive(name, value)
    check_threshold("e_low", e_low)
    check_threshold("e_high", e_high)
    energy = as_float("energy", energy)
    low, mid, high = (jnp.asarray(t, energy.dtype) for t in (t_low, t_mid, t_high))
    temperature = jnp.where(energy < e_low, high, jnp.where(energy > e_high, low, mid))
    unknown = jnp.isnan(energy) | jnp.isnan(jnp.asarray(e_low)) | jnp.isnan(jnp.asarray(e_high))
    return jax.lax.stop_gradient(jnp.where(unknown, jnp.nan, temperature))


class EnergyKDTerms(NamedTuple):
    """The parts of energy distillation, one value for each example; T^2 is included in `kd`."""

    cross_entropy: Float[Array, " batch"]
    kd: Float[Array, " batch"]
    energy: Float[Array, " batch"]
    temperature: Float[Array, " batch"]


def energy_kd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    e_low: Scalar,
    e_high: Scalar,
    *,
    t_low: Scalar = 2.0,
    t_mid: Scalar = 4.0,
    t_high: Scalar = 6.0,
    t_energy: Scalar = 4.0,
) -> EnergyKDTerms:
    """What `energy_kd_loss` adds up, for each example, with the energy and the temperature chosen.

        CE_b,    T_b^2 KL(softmax(z_t,b / T_b) || softmax(z_s,b / T_b)),    E_b,    T_b

    What to log comes from it: the share of the low-energy group is `(terms.energy < e_low).mean()`, that
    of the high-energy group `(terms.energy > e_high).mean()`, the mean temperature
    `terms.temperature.mean()`. Arguments, dtypes, gradient stops and errors as `energy_kd_loss`.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024.
    """
    student, teacher = logit_pair(student_logits, teacher_logits)
    energy = energy_score(teacher, t_energy)
    temperature = energy_temperature(energy, e_low, e_high, t_low=t_low, t_mid=t_mid, t_high=t_high)
    return EnergyKDTerms(
        cross_entropy=cross_entropy(student, labels, reduction="none"),
        kd=kd_loss(student, teacher, temperature, reduction="none"),
        energy=energy,
        temperature=temperature,
    )


def energy_kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    e_low: Scalar,
    e_high: Scalar,
    *,
    ce_weight: Scalar = 0.1,
    kd_weight: Scalar = 0.9,
    t_low: Scalar = 2.0,
    t_mid: Scalar = 4.0,
    t_high: Scalar = 6.0,
    t_energy: Scalar = 4.0,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """Energy KD: cross-entropy and distillation at a temperature chosen by the teacher's energy.

        L_b = ce_weight CE_b + kd_weight T_b^2 KL(softmax(z_t,b / T_b) || softmax(z_s,b / T_b))

    T_b is that of `energy_temperature`. No gradient reaches the teacher's logits or T_b. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits of the teacher in evaluation mode, for the same views.
      labels: in [0, classes). A traced label outside gives NaN.
      e_low: threshold of the low-energy group, from `energy_thresholds`, fixed before training.
      e_high: threshold of the high-energy group.
      ce_weight: weight of the cross-entropy.
      kd_weight: weight of the distillation.
      t_low: temperature of HIGH energies.
      t_mid: temperature in between.
      t_high: temperature of LOW energies.
      t_energy: temperature inside the energy itself; the one the thresholds were made with.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype, label, temperature, threshold or reduction.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024.
    """
    temperatures = {"t_low": t_low, "t_mid": t_mid, "t_high": t_high, "t_energy": t_energy}
    terms = energy_kd_terms(student_logits, teacher_logits, labels, e_low, e_high, **temperatures)
    return reduce(terms.cross_entropy * ce_weight + terms.kd * kd_weight, reduction)


class EnergyDKDTerms(NamedTuple):
    """The parts of decoupled energy distillation, one value for each example; T^2 is included in both parts."""

    cross_entropy: Float[Array, " batch"]
    tckd: Float[Array, " batch"]
    nckd: Float[Array, " batch"]
    energy: Float[Array, " batch"]
    temperature: Float[Array, " batch"]


def energy_dkd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    e_low: Scalar,
    e_high: Scalar,
    *,
    t_low: Scalar = 2.0,
    t_mid: Scalar = 4.0,
    t_high: Scalar = 6.0,
    t_energy: Scalar = 4.0,
) -> EnergyDKDTerms:
    """What `energy_dkd_loss` adds up, for each example, with the energy and the temperature chosen.

        CE_b,    TCKD_b and NCKD_b at T_b (see `dkd_terms`),    E_b,    T_b

    Arguments, dtypes, gradient stops and errors as `energy_dkd_loss`.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024.
    """
    student, teacher = logit_pair(student_logits, teacher_logits)
    energy = energy_score(teacher, t_energy)
    temperature = energy_temperature(energy, e_low, e_high, t_low=t_low, t_mid=t_mid, t_high=t_high)
    hard = cross_entropy(student, labels, reduction="none")
    return EnergyDKDTerms(hard, *dkd_terms(student, teacher, labels, temperature), energy, temperature)


def energy_dkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    e_low: Scalar,
    e_high: Scalar,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    ce_weight: Scalar = 1.0,
    kd_weight: Scalar = 1.0,
    t_low: Scalar = 2.0,
    t_mid: Scalar = 4.0,
    t_high: Scalar = 6.0,
    t_energy: Scalar = 4.0,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """Energy DKD: cross-entropy and decoupled distillation at a temperature chosen by the teacher's energy.

        L_b = ce_weight CE_b + kd_weight (alpha TCKD_b + beta NCKD_b)    (see `dkd_terms`)

    TCKD_b and NCKD_b are taken at the T_b of `energy_temperature`. No gradient reaches the teacher's logits or T_b.
    In float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits of the teacher in evaluation mode, for the same views.
      labels: in [0, classes). A traced label outside gives NaN.
      e_low: threshold of the low-energy group, from `energy_thresholds`, fixed before training.
      e_high: threshold of the high-energy group.
      alpha: weight of the target-class part.
      beta: weight of the non-target-class part.
      ce_weight: weight of the cross-entropy.
      kd_weight: weight of the distillation, which takes the warm-up; the authors use min(epoch / 20, 1), which
        is `optax.linear_schedule(0.0, 1.0, 20)(epoch)`.
      t_low: temperature of HIGH energies.
      t_mid: temperature in between.
      t_high: temperature of LOW energies.
      t_energy: temperature inside the energy itself; the one the thresholds were made with.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype, label, temperature, threshold or reduction.

    References: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024; Zhao, Cui, Song, Qiu and Liang, Decoupled
      Knowledge Distillation, CVPR 2022.
    """
    temperatures = {"t_low": t_low, "t_mid": t_mid, "t_high": t_high, "t_energy": t_energy}
    terms = energy_dkd_terms(student_logits, teacher_logits, labels, e_low, e_high, **temperatures)
    soft = alpha * terms.tckd + beta * terms.nckd
    return reduce(terms.cross_entropy * ce_weight + soft * kd_weight, reduction)
