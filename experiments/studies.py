"""What a reproduction is made of: studies, their claims, and the verdict that the numbers allow."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jkd import metrics
from jkd.errors import UserError

HOLDS, REVERSED, OPEN = "holds", "the reverse holds", "not at this scale"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper, and how it is tested.

    Attributes:
      text: the statement.
      paper: what the paper reports, or "" where it gives no figure.
      better: the arm that is said to be better; with `worse`, tested by the paired difference over seeds.
      worse: the arm that is said to be worse.
      margin: percentage points by which `better` may fall behind and still count (a claim of "not worse").
      value: `(stage, metric)`: tested by the metric's mean over seeds instead ...
      inside: ... which must lie, with its interval, between these two numbers.
    """

    text: str
    paper: str = ""
    better: str = ""
    worse: str = ""
    margin: float = 0.0
    value: tuple[str, str] | None = None
    inside: tuple[float, float] = (-np.inf, np.inf)


@dataclasses.dataclass(frozen=True)
class Study:
    """One comparison: a config, tuned arms, paired seeds, claims.

    Attributes:
      name: of its folder and headings.
      config: `configs/<method>.py[:variant]`.
      rates: the learning rates that each arm is tuned over, on the validation rows of `tuning_seeds` seeds that
        the final runs do not use.
      tuning_seeds: how many.
      claims: what is tested.
      overrides: config fields.
    """

    name: str
    config: str
    rates: Sequence[float]
    tuning_seeds: int
    claims: Sequence[Claim]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TUNE, TEST = "validation/top1", "test/top1"
TUNING_SEED = 1000


def judge(claim: Claim, stages: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict of one claim from the final runs: statement, effect, interval, seeds, verdict."""
    row = {"claim": claim.text, "paper": claim.paper or "no figure"}
    if claim.value is not None:
        stage, metric = claim.value
        found = metrics.mean_interval(np.atleast_1d(np.asarray(stages[stage]["metrics"][metric], float)))
        low, high = claim.inside
        verdict = HOLDS if low <= found.low and found.high <= high else OPEN
        test = f"{stage} {metric} in [{low:g}, {high:g}]"
        numbers = {"effect": float(found.mean), "interval": [float(found.low), float(found.high)], "p_value": None}
        return {**row, "test": test, **numbers, "seeds": int(found.n), "verdict": verdict}
    ours, theirs = (np.asarray(stages[name]["metrics"][TEST], float) for name in (claim.better, claim.worse))
    pair = metrics.paired_difference(ours, theirs)
    if pair.low > -claim.margin:
        verdict = HOLDS
    else:
        verdict = REVERSED if pair.high < -claim.margin else OPEN
    numbers = {"effect": float(pair.mean), "interval": [float(pair.low), float(pair.high)]}
    test = f"{claim.better} - {claim.worse} > {-claim.margin:g}"
    return {**row, "test": test, **numbers, "p_value": float(pair.p_value), "seeds": int(pair.n), "verdict": verdict}


def best_rates(runs: Mapping[float, Mapping[str, Any]], arms: Sequence[str]) -> dict[str, float]:
    """Each arm's learning rate with the highest mean validation accuracy; ties go to the lower rate."""
    chosen = {}
    for arm in arms:
        scores = {rate: float(np.mean(stages[arm]["metrics"][TUNE])) for rate, stages in sorted(runs.items())}
        if not all(np.isfinite(list(scores.values()))):
            raise UserError(f"Arm {arm!r} has no finite validation accuracy at one of the rates {list(scores)}.")
        chosen[arm] = max(scores, key=lambda rate: scores[rate])
    return chosen


def run_study(study: Study, run: Callable[[str, Mapping[str, Any]], dict[str, Any]], arms: Sequence[str]) -> dict:
    """Runs the cells of a study through `run(cell name, overrides) -> results`, and judges its claims.

    Cells: a teacher for tuning and one for the final runs, every rate on the tuning seeds, the tuned arms on the
    final seeds. The tuning seeds draw other splits and initial parameters than the final ones.
    """
    tuning = {**study.overrides, "seed": TUNING_SEED, "seeds": study.tuning_seeds}
    teacher = run("tuning-teacher", {**tuning, "only": ("teacher",)})
    runs = {}
    for rate in study.rates:
        rates = {f"arms.{arm}.lr": rate for arm in arms}
        runs[rate] = run(f"tuning-{rate:g}", {**tuning, **rates, "teacher.workdir": teacher["workdir"]})["stages"]
    chosen = best_rates(runs, arms)
    teacher = run("teacher", {**study.overrides, "only": ("teacher",)})
    rates = {f"arms.{arm}.lr": rate for arm, rate in chosen.items()}
    final = run("final", {**study.overrides, **rates, "teacher.workdir": teacher["workdir"]})
    stages = {**final["stages"], "teacher": teacher["stages"]["teacher"]}
    return {
        "config": study.config,
        "rates": chosen,
        "tuning": {f"{rate:g}": {a: float(np.mean(s[a]["metrics"][TUNE])) for a in arms} for rate, s in runs.items()},
        "stages": stages,
        "claims": [judge(claim, stages) for claim in study.claims],
    }
