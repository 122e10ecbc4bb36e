"""What a reproduction is made of: studies, their claims, and the verdict that the numbers allow."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import Measure
from jkd import metrics
from jkd.errors import UserError
from jkd.train import NonFiniteError

HOLDS, REVERSED, OPEN = "holds", "the reverse holds", "not at this scale"
ALONE = " before correction"  # after HOLDS or REVERSED: not after Holm's, for the number of claims of a study
LEVEL = 0.05


Of = str | tuple[str, str] | list


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper, and how it is tested.

    Attributes:
      text: the statement.
      paper: what the paper reports, or "" where it gives no figure.
      better: the arm that is said to be better; with `worse`, tested by the paired difference over seeds. An arm
        stands for the method's measure (test accuracy by default); any other metric is written `(stage, metric)`; a
        list stands for their sum, so
        that an interaction, (a - b) - (c - d), is better=[a, d], worse=[b, c].
      worse: the arm that is said to be worse.
      margin: percentage points (or whatever the unit is) by which `better` may fall behind and still count (a claim
        of "not worse").
      value: `(stage, metric)`: tested by the metric's mean over seeds instead ...
      inside: ... which must lie, with its interval, between these two numbers.
    """

    text: str
    paper: str = ""
    better: "Of" = ""
    worse: "Of" = ""
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
        the final runs do not use. One: all arms take it, and nothing is tuned. Empty: nothing is tuned, and all arms
        run together at the rates of the config.
      tuning_seeds: how many.
      widen: how often an arm whose best rate is the lowest or the highest of those tried gets another one beyond it.
      fixed: arms without a learning rate, which run once: nothing of them is tuned.
      claims: what is tested.
      arms: of the config that take part; empty: all.
      derived: `derived(stages) -> stages`: made of the final ones, with metrics of the same seeds, for claims about
        several arms at once; they are reported beside the others.
      shared: stages that all arms start from, which run once for the tuning seeds and once for the final ones.
      given: the field of the config by which an arm finds the folder of the run that holds them.
      measure: what arms are compared by, where it is not the method's.
      extra: whether it runs only where it is named, since it takes long or needs packages of data.
    """

    name: str
    config: str
    rates: Sequence[float]
    tuning_seeds: int
    claims: Sequence[Claim]
    arms: Sequence[str] = ()
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda stages: {}
    shared: Sequence[str] = ()
    given: str = "teacher.workdir"
    measure: Measure | None = None
    extra: bool = False
    widen: int = 0
    fixed: Sequence[str] = ()


TUNING_SEED = 1000
# What the methods tune over, alike, so that they share their baselines' runs: dense nets on digits, and `hard`.
RATES, HARD_RATES = (0.001, 0.003, 0.01, 0.03, 0.1), (0.06, 0.2, 0.6)


def measure_of(study: Mapping[str, Any]) -> Measure:
    """What the arms of a study's results are compared by."""
    return Measure(**study.get("measure", {}))


def judge(claim: Claim, stages: Mapping[str, Any], measure: Measure | None = None) -> dict[str, Any]:
    """The verdict of one claim from the final runs: statement, effect, interval, seeds, verdict.

    The effect is how much better `better` is: where less of the measure is better, what is compared by it is negated.
    """
    measure = measure or Measure()
    row = {"claim": claim.text, "paper": claim.paper or "no figure"}
    if claim.value is not None:
        found = metrics.mean_interval(_values(claim.value, stages, measure))
        low, high = claim.inside
        verdict = HOLDS if low <= found.low and found.high <= high else OPEN
        test = f"{_shown(claim.value)} in [{low:g}, {high:g}]"
        numbers = {"effect": float(found.mean), "interval": [float(found.low), float(found.high)], "p_value": None}
        return {**row, "test": test, **numbers, "seeds": int(found.n), "verdict": verdict}
    ours, theirs = (_values(one, stages, measure) for one in (claim.better, claim.worse))
    # The test that belongs to the interval: exact sign flips of few seeds could never be significant.
    pair = metrics.paired_difference(ours, theirs, margin=claim.margin, exact=False)
    if pair.low > -claim.margin:
        verdict = HOLDS
    else:
        verdict = REVERSED if pair.high < -claim.margin else OPEN
    numbers = {"effect": float(pair.mean), "interval": [float(pair.low), float(pair.high)]}
    test = f"{_shown(claim.better)} - {_shown(claim.worse)} > {-claim.margin:g}"
    return {**row, "test": test, **numbers, "p_value": float(pair.p_value), "seeds": int(pair.n), "verdict": verdict}


def _values(of: Of, stages: Mapping[str, Any], measure: Measure) -> np.ndarray:
    if isinstance(of, list):
        return np.sum([_values(one, stages, measure) for one in of], axis=0)
    stage, metric = (of, measure.metric) if isinstance(of, str) else of
    values = np.atleast_1d(np.asarray(stages[stage]["metrics"][metric], float))
    return -values if measure.lower and isinstance(of, str) else values


def _shown(of: Of) -> str:
    if isinstance(of, list):
        return f"({' + '.join(_shown(one) for one in of)})"
    return of if isinstance(of, str) else " ".join(of)


def best_rates(scores: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """Each arm's learning rate with the highest mean score on validation data; ties go to the lower rate.

    Raises:
      UserError: if an arm diverged at every rate.
    """
    for arm, of in scores.items():
        if not np.isfinite(list(of.values())).any():
            raise UserError(f"Arm {arm!r} diverged at all of the rates {list(of)}: add lower ones to the study.")
    return {arm: max(sorted(of), key=lambda rate: of[rate]) for arm, of in scores.items()}


def further_rates(scores: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The next rate of each arm whose best one is at an edge: as far from it as its neighbor, to one digit."""
    found = {}
    for arm, best in best_rates(scores).items():
        tried = sorted(scores[arm])
        if best in (tried[0], tried[-1]):
            neighbor = tried[1] if best == tried[0] else tried[-2]
            found[arm] = float(f"{best * best / neighbor:.1g}")
    return found


def _tuned(
    study: Study, arms: Sequence[str], run: Callable[[Sequence[tuple[str, float]]], Sequence[Any]], measure: Measure
) -> dict[str, dict[float, float]]:
    """The scores of every arm at every rate tried; `run([(arm, rate)])` gives their results."""
    scores: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    grid = [(arm, rate) for arm in arms for rate in study.rates]
    for _ in range(study.widen + 1):
        for (arm, rate), results in zip(grid, run(grid), strict=True):
            scores[arm][rate] = _score(results, arm, measure)
        grid = list(further_rates(scores).items())
    return scores


def run_study(
    study: Study,
    run: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any]],
    teachers: Sequence[str],
    arms: Sequence[str],
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Runs the cells of a study through `run({cell: overrides}) -> {cell: results}`, and judges its claims.

    Cells: the teachers for tuning and those for the final runs, every arm at every rate on the tuning seeds, every
    tuned arm on the final seeds. Without teachers, an arm's cell trains all that the arm starts from. The tuning
    seeds draw other splits and initial parameters than the final ones, and the rates are chosen by validation rows: no
    test row decides anything. Without rates there is one cell. A cell that diverged is a `NonFiniteError` in place of
    its results.
    """
    measure = measure or Measure()
    if not study.rates:
        return _judged(study, _sound(run({"whole": {"only": (*teachers, *arms)}}))["whole"]["stages"], {}, {}, measure)
    tuning = {"seed": TUNING_SEED, "seeds": study.tuning_seeds}
    only = {"only": tuple(teachers)}
    first: dict[str, Any] = {"tuning-teachers": {**tuning, **only}} if len(study.rates) > 1 else {}
    first["teachers"] = only
    taught = _sound(run(first)) if teachers else {}

    def student(arm: str, rate: float | None, teacher: str) -> dict[str, Any]:
        given = {study.given: taught[teacher]["workdir"]} if taught else {}
        return {"only": (arm,), **({} if rate is None else {f"arms.{arm}.lr": rate}), **given}

    def tune(grid: Sequence[tuple[str, float]]) -> list[Any]:
        named = {f"tuning-{arm}-{rate:g}": (arm, rate) for arm, rate in grid}
        tried = run({name: {**tuning, **student(*of, "tuning-teachers")} for name, of in named.items()})
        return [tried[name] for name in named]

    rated = [arm for arm in arms if arm not in study.fixed]
    scores = _tuned(study, rated, tune, measure) if len(study.rates) > 1 else {}
    chosen = best_rates(scores) if scores else dict.fromkeys(rated, study.rates[0])
    final = _sound(run({f"final-{arm}": student(arm, chosen.get(arm), "teachers") for arm in arms}))
    stages = {name: taught["teachers"]["stages"][name] for name in teachers}
    for arm in arms:  # with the stages that led to it
        found = final[f"final-{arm}"]["stages"]
        stages |= {name: found[name] for name in found if name not in stages}
    return _judged(study, stages, chosen, {arm: _plain(of) for arm, of in scores.items()}, measure)


def _sound(found: Mapping[str, Any]) -> Mapping[str, Any]:
    for results in found.values():
        if isinstance(results, NonFiniteError):
            raise results
    return found


def _score(results: Any, arm: str, measure: Measure) -> float:
    if isinstance(results, NonFiniteError):  # this arm diverges at this rate: a result like any other
        return -np.inf
    value = float(np.mean(results["stages"][arm]["metrics"][measure.tune]))
    return -value if measure.lower else value


def _judged(
    study: Study, stages: Mapping[str, Any], rates: Mapping[str, float], tuning: Mapping, measure: Measure
) -> dict[str, Any]:
    stages = {**stages, **study.derived(stages)}
    claims = judge_all(study.claims, stages, measure)
    found = {"config": study.config, "rates": rates, "tuning": tuning, "stages": stages, "claims": claims}
    return {**found, "measure": dataclasses.asdict(measure)}


def _plain(scores: Mapping[float, float]) -> dict[str, float | None]:
    return {f"{rate:g}": score if np.isfinite(score) else None for rate, score in scores.items()}


def judge_all(
    claims: Sequence[Claim], stages: Mapping[str, Any], measure: Measure | None = None
) -> list[dict[str, Any]]:
    """The verdicts of a study's claims.

    p-values adjusted for their number (Holm) stand beside the plain ones, and a verdict that does not survive this
    says so.
    """
    rows = [judge(claim, stages, measure) for claim in claims]
    tested = [row for row in rows if row["p_value"] is not None]
    if tested:
        for row, value in zip(tested, metrics.holm([row["p_value"] for row in tested]), strict=True):
            row["p_holm"] = float(value)
            if row["verdict"] != OPEN and value > LEVEL:
                row["verdict"] += ALONE
    return rows
