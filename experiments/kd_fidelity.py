"""Why KD works: what students see, how far they then follow their teachers, and where all of them look.

Guo et al., Why does Knowledge Distillation work? Rethink its attention and fidelity mechanism, Expert Systems with
Applications 262, 2025. Plain KD from one to three teachers. The grid: each teacher was trained on weak or on strong
views, and during distillation student and teachers see the views of the student's strength.

Augmented inputs lower every agreement by being harder. What students are measured by is therefore measured on the clean
test rows too.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import arms, measures
from experiments.arms import predictor
from experiments.distillation_setup import Setup, bank_view, variable_shapes
from experiments.studies import Claim, Study
from jkd import metrics, train
from jkd.errors import UserError

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]
BASELINE = "T1w_T2w_Sw"
LOOKS = ("clean", "augmented")


def stages(config: ConfigDict) -> list[train.Stage]:
    """The teachers of a config and one student for each arm, measured as the paper does."""
    return arms.stages(config, evaluators)


def evaluators(setup: Setup, arm: ConfigDict) -> dict[str, train.Evaluator]:
    """What a student is measured by beside what all methods share."""
    if setup.cached:
        raise UserError("kd_fidelity looks into its teachers: set teacher.source=live.")
    check_maps(setup, arm)
    return {"looks": looks_evaluator(setup, arm), "train": train_evaluator(setup, arm)}


# --- measures of one student ---


def looks(setup: Setup, arm: ConfigDict, batch: Any) -> dict[str, jax.Array]:
    """The images themselves, and the arm's view of them: one view of each image, whatever seed, arm and batch."""
    views, images = setup.views[arm.view], batch["image"]
    return {
        "clean": views.plain(images),
        "augmented": bank_view(views, jax.random.key(0), 0, batch["index"], images),
    }


def looks_evaluator(setup: Setup, arm: ConfigDict) -> train.Evaluator:
    """On the test rows, clean and as the arm's view: accuracy, what `measures.agreement` has, and attention.

    `iou_T1_S` and so on (percent): how far the attention of both networks overlaps, pooled over all pixels; of all
    networks at once, and of all teachers where there are three. `blank`: percent of maps that point nowhere. `affinity`
    is the augmented accuracy by the clean one.
    """

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        def of(images: jax.Array) -> dict[str, Any]:
            taught = [(setup.teachers[name], consts["teachers"][name]) for name in arm.teachers]
            seen = [look(model, variables, images) for model, variables in (*taught, (setup.student, published))]
            logits, masks = [out for out, _ in seen], jnp.stack([on for _, on in seen])
            return {
                **measures.agreement_sums(logits[-1], logits[:-1], batch["label"], mask),
                "attention": metrics.attention_counts(masks, mask)._asdict(),
                "teachers": metrics.attention_counts(masks[:-1], mask)._asdict() if len(taught) > 2 else {},
            }

        return {name: of(images) for name, images in looks(setup, arm, batch).items()}

    def finish(sums: Any) -> dict[str, float]:
        found = {f"{name}_{metric}": value for name in LOOKS for metric, value in summary(sums[name]).items()}
        return found | {"affinity": found["augmented_top1"] / max(found["clean_top1"], 1e-9)}

    return train.Evaluator(setup.rows("test"), collect, finish)


def train_evaluator(setup: Setup, arm: ConfigDict) -> train.Evaluator:
    """Accuracy in percent on the training rows, clean and as the arm's view."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        def hits(images: jax.Array) -> jax.Array:
            logits = setup.student.apply(published, images, train=False).logits
            return (metrics.topk_correct(logits, batch["label"]) & mask).sum()

        return {"total": mask.sum(), **{name: hits(seen) for name, seen in looks(setup, arm, batch).items()}}

    def finish(sums: Any) -> dict[str, float]:
        return {f"{name}_top1": 100 * float(sums[name]) / float(sums["total"]) for name in LOOKS}

    return train.Evaluator(setup.rows("train"), collect, finish)


def look(model: Any, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A network's logits and the mask of its attention, of the images' size."""
    out = model.apply(variables, images, train=False)
    head = variables["params"]["head"]
    blocks = {int(name.removeprefix("block")): x for name, x in out.features.items() if re.fullmatch(r"block\d+", name)}
    if not blocks:
        raise UserError("attention needs a network with feature maps: set teacher.model and student.model to such.")
    attention = metrics.class_sum_attention(
        blocks[max(blocks)], head["kernel"], head["bias"], (images.shape[1], images.shape[2])
    )
    return out.logits, metrics.binarize_attention(attention)


def check_maps(setup: Setup, arm: ConfigDict) -> None:
    """Raises UserError for networks without class activation maps, before anything is trained."""
    for stage in (*arm.teachers, "student"):
        images = jax.ShapeDtypeStruct((1, *setup.task.shape), jnp.float32)
        jax.eval_shape(functools.partial(look, setup.model(stage)), variable_shapes(setup, stage), images)


def summary(sums: Any) -> dict[str, float]:
    """The metrics of one look, from sums over its rows."""
    bins, (counts, taught) = sums["bins"], (counts_of(sums[name]) for name in ("attention", "teachers"))
    found = {"top1": 100 * float(bins["correct"].sum() / bins["total"].sum()), **measures.agreement(sums)}
    count = len(counts.empty)
    names, iou = [*(f"T{m + 1}" for m in range(count - 1)), "S"], np.asarray(counts.iou)
    for i, j in itertools.combinations(range(count), 2):
        found[f"iou_{names[i]}_{names[j]}"] = 100 * float(iou[i, j])
    if count > 2:
        found[f"iou_{'_'.join(names)}"] = 100 * float(counts.all_iou)
    if taught:
        found[f"iou_{'_'.join(names[:-1])}"] = 100 * float(taught.all_iou)
    return found | {"blank": 100 * float(jnp.diagonal(counts.empty).mean() / counts.images)}


def counts_of(sums: Any) -> Any:
    """Attention counts from what was stored of them; None where nothing was."""
    return metrics.AttentionCounts(**jax.tree.map(jnp.asarray, sums)) if sums else None


# --- measures of the grid ---


def metric(stage: Any, name: str) -> np.ndarray:
    """One value a seed."""
    return np.atleast_1d(np.asarray(stage["metrics"][name], float))


def row(stage: Any) -> dict[str, np.ndarray]:
    """What the paper compares settings of two teachers by, of one setting: one value a seed."""
    clean, augmented = metric(stage, "train/clean_top1"), metric(stage, "train/augmented_top1")
    return {
        "accuracy": metric(stage, "test/top1"),
        "gap": clean - metric(stage, "test/top1"),
        "augmented_gap": augmented - metric(stage, "test/top1"),
        "affinity": metric(stage, "looks/affinity"),
        **{
            f"{look}_{name}": metric(stage, f"looks/{look}_{source}")
            for look in LOOKS
            for name, source in (("fidelity", "fidelity"), ("mi", "mutual_information"), ("iou", "iou_T1_T2"))
        },
    }


def grid(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Made of the settings of two teachers: `Sw` and `Ss`, the means of `row` over those of a student's strength, and
    `grid`, rank correlations over all of them, seed by seed.
    """
    rows = {name: row(stage) for name, stage in stages.items() if re.fullmatch("T1._T2._S.", name)}
    found = {}
    for strength in ("Sw", "Ss"):
        chosen = [one for name, one in rows.items() if name.endswith(strength)]
        found[strength] = {"metrics": {name: np.mean([one[name] for one in chosen], axis=0) for name in chosen[0]}}
    pairs = (("augmented_iou", "accuracy"), ("augmented_iou", "augmented_fidelity"), ("clean_iou", "clean_fidelity"))
    correlations = {f"{a}~{b}": correlation([one[a] for one in rows.values()], rows.values(), b) for a, b in pairs}
    listed = {name: {k: v.tolist() for k, v in one["metrics"].items()} for name, one in found.items()}
    return {name: {"metrics": one} for name, one in {**listed, "grid": correlations}.items()}


def correlation(values: Sequence[np.ndarray], rows: Any, other: str) -> list[float]:
    """Spearman's over settings, for each seed; 0 where all settings are equal, which orders nothing."""
    first, second = np.stack(values, axis=1), np.stack([one[other] for one in rows], axis=1)
    return [float(np.nan_to_num(metrics.spearman(a, b))) for a, b in zip(first, second, strict=True)]


def less(text: str, name: str, paper: str = "lower") -> Claim:
    """Strong views of the student give less of something, on average over pairs of teachers."""
    return Claim(text, paper, better=("Sw", name), worse=("Ss", name))


CLAIMS = (
    Claim("strong views give the better student", "better", better=("Ss", "accuracy"), worse=("Sw", "accuracy")),
    less("strong views make the gap of training and test rows smaller (clean rows)", "gap", "smaller"),
    less("strong views make the gap smaller (training rows as seen in training)", "augmented_gap", "smaller"),
    less("strong views lower fidelity on the student's views", "augmented_fidelity"),
    less(
        "strong views lower fidelity on clean rows (what is not due to harder rows)", "clean_fidelity", "not told apart"
    ),
    less("strong views lower mutual information on the student's views", "augmented_mi"),
    less("strong views lower mutual information on clean rows", "clean_mi", "not told apart"),
    less("teachers overlap less on strong views than on weak ones", "augmented_iou"),
    Claim(
        "over the grid, less overlap of teachers goes with accuracy",
        "yes",
        value=("grid", "augmented_iou~accuracy"),
        inside=(-1.0, 0.0),
    ),
    Claim(
        "over the grid, less overlap of teachers goes with less fidelity",
        "yes",
        value=("grid", "augmented_iou~augmented_fidelity"),
        inside=(0.0, 1.0),
    ),
    Claim("the same on clean rows", "not told apart", value=("grid", "clean_iou~clean_fidelity"), inside=(0.0, 1.0)),
)
PAIRS = tuple(f"T1{a}_T2{b}_S{s}" for a, b in ("ww", "ss") for s in "ws")
STUDIES = (Study("digits", "configs/kd_fidelity.py", (0.3, 0.8), 2, CLAIMS, PAIRS, grid),)
