"""How well binary codes find across and within modalities: evaluators that all hashing methods share, and baselines.

Queries and what is searched are different rows; an item is relevant where it shares a label with the query. Distances
are Hamming's, of equal ones the earlier row comes first, and queries without relevant items are left out and counted.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.pairs import SIDES, PairTask
from experiments.report import Measure
from jkd import hashing, metrics, train
from jkd.errors import UserError, unknown

MEASURE = Measure("test/cross", "validation/cross", "mAP across modalities, %")
PARTS = {"validation": "validation", "test": "query"}  # of each evaluator, whose rows ask
TASKS = {f"{asks}_to_{found}": (asks, found) for asks in SIDES for found in SIDES}
CROSS = ("first_to_second", "second_to_first")
LINEAR = ("cca", "pca", "lsh", "random")
Scores = Callable[[Any, Any, Mapping[str, Any]], Mapping[str, jax.Array]]


def section() -> ConfigDict:
    """The `retrieval` section of a config: beside the whole ranking, its first `top` items are judged; 0: not."""
    return ConfigDict({"top": 50, "every": 0})


def check(config: ConfigDict) -> None:
    """Raises UserError for numbers that nothing could be measured with."""
    cls.check_numbers(config, "", positive=("bits",))
    cls.check_numbers(config.retrieval, "retrieval", nonnegative=("top", "every"))


def evaluators(config: ConfigDict, task: PairTask, scores: Scores) -> dict[str, train.Evaluator]:
    """Of what a hashing stage publishes: "validation" and "test", whose queries search the same database.

    In percent: `first_to_second`, `second_to_first`, `first_to_first` and `second_to_second`, the mean average
    precision of the whole ranking for queries of the one side and codes of the other; `cross`, the mean of the first
    two; the same with `_top` for the first `retrieval.top` items, over the relevant ones found. `constant_bits`: the
    share of bits, of both sides, that are equal for all that is searched. `without`: queries without relevant items.

    Args:
      config: its `retrieval` section and `eval_batch_size`.
      task: the pairs.
      scores: `scores(published, consts, batch) -> {side: [batch, bits]}`, of a batch as it is stored; the bit is 1
        where a score is >= 0.
    """
    collect = functools.partial(_collect, scores)  # one object: both parts share a program
    found = {}
    for name, asks in PARTS.items():
        if asks not in task.sizes:
            continue
        queries, searched = task.sizes[asks], task.sizes["database"]
        found[name] = train.Evaluator(
            functools.partial(task.part, name=f"{asks}+database", batch_size=config.eval_batch_size),
            collect,
            functools.partial(findings, queries=queries, top=min(config.retrieval.get("top", 0), searched)),
            kind="gather",
            every=config.retrieval.get("every", 0),
            warn=_warn,
        )
    return found


def _collect(scores: Scores, published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
    found = scores(published, consts, batch)
    bits = {side: found[side] >= 0 for side in SIDES}
    # No bit tells a NaN: said aloud instead of ranked.
    sound = jnp.stack([jnp.isfinite(found[side]).all(1) for side in SIDES]).all(0)
    return {**bits, "label": batch["label"], "sound": sound}


def findings(rows: Mapping[str, np.ndarray], queries: int, top: int = 0) -> dict[str, float]:
    """What `evaluators` measure, from bool[rows, bits] of both sides and labels; the first `queries` rows ask.

    Raises:
      UserError: if a row has no code, since its scores were not finite.
    """
    if not rows["sound"].all():
        raise UserError(f"The codes of {int((~rows['sound']).sum())} rows are NaN or infinite: nothing can be ranked.")
    codes = {side: metrics.pack_bits(rows[side]) for side in SIDES}
    ask, searched = slice(None, queries), slice(queries, None)
    labels = jnp.asarray(rows["label"])
    found: dict[str, float] = {}
    for k, suffix in ((None, ""), (top, "_top")) if top else ((None, ""),):
        for name, (one, other) in TASKS.items():
            ranked = _average_precision(codes[one][ask], codes[other][searched], labels[ask], labels[searched], k)
            found[name + suffix] = 100 * float(ranked.map)
            found["without"] = float(queries - ranked.counted)
        found["cross" + suffix] = float(np.mean([found[name + suffix] for name in CROSS]))
    bits = np.stack([rows[side][searched] for side in SIDES])
    found["constant_bits"] = float((bits.all(1) | ~bits.any(1)).mean() * 100)
    return found


@functools.partial(jax.jit, static_argnums=4)
def _average_precision(queries: Any, database: Any, asked: Any, labels: Any, k: int | None) -> Any:
    return metrics.hamming_mean_average_precision(queries, database, asked, labels, k)


def _warn(found: Mapping[str, float]) -> str | None:
    if found["constant_bits"] > 50:
        return f"{found['constant_bits']:.0f} % of the bits are the same for all codes: they tell nothing apart"
    return None


# --- hash functions that nothing is trained for ---


def flat(batch: Mapping[str, Any], side: str) -> jax.Array:
    """One vector for each example of a side; vectors of tokens are averaged."""
    x = jnp.asarray(batch[side])
    if f"{side}_mask" in batch:
        x = hashing.pool_tokens(x, jnp.asarray(batch[f"{side}_mask"]))
    return x.reshape(x.shape[0], -1)


def linear_scores(task: PairTask, kind: str, bits: int) -> Scores:
    """The scores of what a stage of `linear_stage` publishes."""

    def scores(published: Any, consts: Any, batch: Any) -> dict[str, jax.Array]:
        if kind == "random":
            draw = jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), (bits,)), (None, 0))
            keys = jax.random.split(jax.random.wrap_key_data(published["key"]))
            return {side: draw(key, batch["index"]) for side, key in zip(SIDES, keys, strict=True)}
        seen = task.view(consts, batch)
        return {side: hashing.project(hashing.Projection(**published[side]), flat(seen, side)) for side in SIDES}

    return scores


def linear_stage(config: ConfigDict, task: PairTask, name: str, kind: str) -> train.Stage:
    """A stage without steps, for each seed, of linear hash functions fitted to the training rows.

    Kinds: "cca", the directions of both sides that correlate most; "pca", those of each side's largest variance; "lsh",
    random ones; "random", codes that have nothing to do with the input, for what chance gives.

    Raises:
      UserError: for another kind.
    """
    if kind not in LINEAR:
        raise unknown("kind of linear hash functions", kind, LINEAR)

    def prepare(key: jax.Array, previous: Any, sweep: Callable) -> dict[str, Any]:
        consts = task.draw(key)
        return {**consts, "functions": _functions(config, task, kind, jax.random.fold_in(key, 1), consts)}

    made = train.Stage(
        name,
        0,
        prepare=prepare,
        init=lambda key, previous, consts: consts["functions"],
        evaluators=evaluators(config, task, linear_scores(task, kind, config.bits)),
    )
    return train.ensemble(made, keys=cls.member_keys(config), mode=config.ensemble)


def _functions(config: ConfigDict, task: PairTask, kind: str, key: jax.Array, consts: Any) -> dict[str, Any]:
    if kind == "random":
        return {"key": np.asarray(jax.random.key_data(key))}
    rows = consts["rows"]["train"][: config.eval_batch_size if config.data.blank else None]
    batch = task.view(consts, task.pool.rows.read(rows))
    sides = [np.asarray(flat(batch, side), np.float32) for side in SIDES]
    if config.data.blank:  # a plan: nothing correlates or varies
        found = [hashing.Projection(np.zeros(x.shape[1]), np.zeros((x.shape[1], config.bits))) for x in sides]
    elif kind == "cca":
        found = list(hashing.cca_projections(sides[0], sides[1], config.bits))
    elif kind == "pca":
        found = [hashing.pca_projection(x, config.bits) for x in sides]
    else:
        keys = jax.random.split(key)
        found = [hashing.lsh_projection(one, x, config.bits) for one, x in zip(keys, sides, strict=True)]
    functions = {side: one._asdict() for side, one in zip(SIDES, found, strict=True)}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), functions)
