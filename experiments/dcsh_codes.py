"""Step 1 of spectral hashing as stages: anchor graphs of training pairs, and the codes that they agree on."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.pairs import SIDES, PairTask
from jkd import data, hashing, metrics, train
from jkd.errors import UserError, unknown

# What each kind of codes is made from.
GRAPHS = {"joint": SIDES, "first": SIDES[:1], "second": SIDES[1:]}
HYPERPLANES = {"lsh": SIDES, "lsh_first": SIDES[:1], "lsh_second": SIDES[1:]}
NORMALIZATIONS = ("l2", "standardize", "none")
SUFFIX = "_codes"  # of the stages of step 1


def check(config: ConfigDict, rows: int | None = None) -> None:
    """Raises UserError for numbers that no codes could be made with, of so many training pairs where that is known."""
    graph, codes = config.graph, config.codes
    cls.check_numbers(graph, "graph", positive=("anchors", "nearest"), nonnegative=("kmeans_iters", "dense_anchors"))
    cls.check_numbers(codes, "codes", positive=("inner", "judged"), nonnegative=("itq_iters",))
    if graph.normalize not in NORMALIZATIONS:
        raise unknown("graph.normalize", graph.normalize, NORMALIZATIONS)
    if not config.bits < graph.anchors:
        raise UserError(f"graph.anchors={graph.anchors} must be more than bits={config.bits}.")
    if graph.nearest > graph.anchors:
        raise UserError(f"graph.nearest={graph.nearest} must be at most graph.anchors={graph.anchors}.")
    if rows is not None and rows < graph.anchors:
        raise UserError(f"graph.anchors={graph.anchors} is more than the {rows} training pairs.")
    if codes.redraw and config.data.name != "clusters":
        raise UserError(f"codes.redraw makes data anew for each seed, which data.name={config.data.name!r} cannot.")


# --- features ---


def side_features(task: PairTask, consts: Any, batch: Mapping[str, Any], side: str, normalize: str) -> np.ndarray:
    """What graphs compare: one vector for each example, float32; words are averaged.

    Raises:
      UserError: for a text without words, or a number that is not finite.
    """
    x, mask = np.asarray(task.view(consts, batch)[side], np.float32), batch.get(f"{side}_mask")
    if mask is not None:
        if not mask.any(1).all():
            raise UserError(f"Text {int(np.argmin(mask.any(1)))} of column {side!r} has no word: it has no code.")
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    x = x.reshape(len(x), -1)
    if not np.isfinite(x).all():
        raise UserError(f"Column {side!r} holds NaN or inf.")
    if normalize == "l2":
        norms = np.sqrt(np.square(x).sum(1, keepdims=True))
        return x / np.where(norms > 0, norms, 1)
    if normalize == "standardize":
        deviations = x.std(0)
        return (x - x.mean(0)) / np.where(deviations > 0, deviations, 1)
    return x


def training_features(
    config: ConfigDict, task: PairTask, consts: Any, key: jax.Array
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The features of each side of the training pairs, and their labels, which nothing here but evaluation reads."""
    rows, pool = np.asarray(consts["rows"]["train"]), task.pool
    if config.data.blank:  # a plan: no text has words, and only the number of rows matters
        return {side: np.zeros((len(rows), 1), np.float32) for side in SIDES}, np.zeros(len(rows), np.int32)
    if config.codes.redraw:
        c, seed = config.data, int(jax.random.randint(key, (), 0, cls.SPLIT_SEEDS))
        pool = data.make_two_view_clusters(len(pool), c.clusters, noise=c.noise, seed=seed)
    batch = pool.rows.read(rows)
    found = {side: side_features(task, consts, batch, side, config.graph.normalize) for side in SIDES}
    return found, batch["label"]


@functools.partial(jax.jit, static_argnames=("anchors", "nearest", "iters"))
def _graph(key: jax.Array, x: jax.Array, anchors: int, nearest: int, iters: int) -> Any:
    centers = hashing.kmeans(key, x, anchors, iters=iters)
    return hashing.graph_factor(hashing.sparse_anchor_graph(x, centers, nearest))


def factor_of(key: jax.Array, x: np.ndarray, config: ConfigDict) -> dict[str, np.ndarray]:
    """The factor of one side's anchor graph, as consts hold it: whole up to `graph.dense_anchors`, else its entries.

    Raises:
      UserError: where too few anchors are near any row for the bits.
    """
    graph, bits = config.graph, config.bits
    if config.data.blank:
        indices = np.zeros((len(x), graph.nearest), np.int32)
        found = hashing.SparseRows(indices, np.zeros(indices.shape, np.float32), graph.anchors)
    else:
        found = _graph(key, x, graph.anchors, graph.nearest, graph.kmeans_iters)
        used = len(np.unique(np.asarray(found.indices)[np.asarray(found.values) > 0]))
        if used < bits + 1:
            raise UserError(
                f"bits={bits} needs at least {bits + 1} anchors with neighbours, and {used} of the "
                f"graph.anchors={graph.anchors} have any: rows that differ are too few. Set fewer bits."
            )
    if graph.anchors <= graph.dense_anchors:
        return {"dense": np.asarray(found.dense())}
    return {"indices": np.asarray(found.indices), "values": np.asarray(found.values)}


def factors_of(consts: Any, anchors: int) -> tuple[Any, ...]:
    """The factors that consts hold."""
    return tuple(
        one["dense"] if "dense" in one else hashing.SparseRows(one["indices"], one["values"], anchors)
        for one in consts["by_row"]["factors"]
    )


# --- stages ---


@dataclasses.dataclass(frozen=True, eq=False)
class CodeStages:
    """Makes the stages of step 1.

    What has a row for each training pair is below the name "by_row", which meshes split by rows.

    Attributes:
      config: the whole of it.
      task: its pairs.
    """

    config: Any
    task: PairTask

    def stage(self, name: str, arm: ConfigDict) -> train.Stage:
        """The stage of an arm; it publishes {"codes": int8[training rows, bits]}."""
        drawn = arm.codes in HYPERPLANES
        made = train.Stage(
            name + SUFFIX,
            0 if drawn else arm.iters,
            prepare=functools.partial(self.prepare_hyperplanes if drawn else self.prepare_graphs, arm),
            init=self.init_hyperplanes if drawn else self.init_codes,
            step=self.steps[arm.weighted],
            publish=published,
            evaluators={"train": self.evaluator},
        )
        return train.ensemble(made, keys=cls.member_keys(self.config), mode=self.config.ensemble)

    def _drawn(self, arm: ConfigDict, key: jax.Array, sides: tuple[str, ...]) -> tuple[dict[str, Any], dict, Any]:
        """Consts of every stage of step 1, the features of the sides that count, and a key."""
        consts, feature_key = self.task.draw(key), jax.random.fold_in(key, 2)
        features, label = training_features(self.config, self.task, consts, feature_key)
        position = np.zeros(len(self.task.pool.rows), np.int32)
        position[consts["rows"]["train"]] = np.arange(len(label))
        consts = {"rows": {"train": consts["rows"]["train"]}, "position": position, "label": label}
        return consts, {side: features[side] for side in sides}, jax.random.fold_in(key, 3)

    def prepare_graphs(self, arm: ConfigDict, key: jax.Array, previous: Any, sweep: Any) -> dict[str, Any]:
        """The graphs of the arm's sides; arms with equal sides have equal ones."""
        consts, features, graph_key = self._drawn(arm, key, GRAPHS[arm.codes])
        keys = dict(zip(SIDES, jax.random.split(graph_key), strict=True))
        factors = [factor_of(keys[side], x, self.config) for side, x in features.items()]
        weights = {name: np.float32(arm[name]) for name in ("alpha", "rho")}
        return {**consts, **weights, "by_row": {"factors": factors}}

    def prepare_hyperplanes(self, arm: ConfigDict, key: jax.Array, previous: Any, sweep: Any) -> dict[str, Any]:
        """Codes by random hyperplanes through the features of the arm's sides, joined."""
        consts, features, drawn_key = self._drawn(arm, key, HYPERPLANES[arm.codes])
        x = np.concatenate(list(features.values()), axis=1)
        scores = hashing.project(hashing.lsh_projection(drawn_key, x, self.config.bits), x)
        return {**consts, "codes": np.asarray(hashing.to_signs(scores))}

    def init_hyperplanes(self, key: jax.Array, previous: Any, consts: Any) -> dict[str, Any]:
        """The codes that were drawn."""
        return {"by_row": {"codes": consts["codes"]}}

    def init_codes(self, key: jax.Array, previous: Any, consts: Any) -> dict[str, Any]:
        """The start of the alternating optimization."""
        factors = factors_of(consts, self.config.graph.anchors)
        return stored(hashing.initial_codes(key, factors, self.config.bits, itq_iters=self.config.codes.itq_iters)) | {
            "grams": [hashing.centered_gram(factor) for factor in factors]
        }

    @functools.cached_property
    def steps(self) -> dict[bool, Callable]:
        """A round, weighted by eigenvalues or not; arms share them."""
        return {weighted: functools.partial(self._round, weighted) for weighted in (True, False)}

    def _round(self, weighted: bool, key: jax.Array, state: Any, consts: Any, batch: Any, t: Any) -> Any:
        factors, weights = factors_of(consts, self.config.graph.anchors), {"weight_eigs": weighted}
        weights |= {name: consts[name] for name in ("alpha", "rho")}
        found = hashing.refine_codes(
            key, factors, restored(state), inner=self.config.codes.inner, grams=state["grams"], **weights
        )
        changed = (found.codes != state["by_row"]["codes"]).mean()
        objective = hashing.objective_of(factors, found, **weights)
        return stored(found) | {"grams": state["grams"]}, {"objective": objective, "changed": changed}

    @functools.cached_property
    def evaluator(self) -> train.Evaluator:
        """How well codes of training pairs find others of their class: shared by construction, so no claim's test."""

        def source(consts: Any) -> data.Source:
            rows = np.asarray(consts["rows"]["train"])[: self.config.codes.judged]
            return self.task.part({"rows": {"train": rows}}, "train", self.config.eval_batch_size)

        def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
            position = consts["position"][batch["index"]]
            return {"codes": published["codes"][position], "label": consts["label"][position]}

        return train.Evaluator(source, collect, judged, kind="gather")


def judged(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean average precision in percent, every code a query among all others, and the largest bit correlation."""
    codes, label = rows["codes"], rows["label"]
    others = ~np.eye(len(codes), dtype=bool)
    # Last and not relevant: as if the query was not there.
    distances = jnp.where(others, metrics.hamming_distance(codes, codes), codes.shape[1] + 1)
    found = metrics.mean_average_precision(distances, metrics.share_label(label, label) & others)
    return {"map": 100 * float(found.map), "bit_correlation": float(hashing.max_bit_correlation(codes))}


def stored(state: hashing.DCSHState) -> dict[str, Any]:
    """The state of a stage."""
    by_row = {"views": list(state.views), "codes": state.codes, "targets": state.targets}
    return {"by_row": by_row, "eigenvalues": list(state.eigenvalues)}


def restored(state: Any) -> hashing.DCSHState:
    """What `stored` was made from."""
    rows = state["by_row"]
    return hashing.DCSHState(tuple(rows["views"]), tuple(state["eigenvalues"]), rows["codes"], rows["targets"])


def published(state: Any) -> dict[str, Any]:
    """What networks learn from."""
    return {"codes": state["by_row"]["codes"]}
