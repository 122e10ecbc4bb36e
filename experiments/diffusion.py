"""Systematic diffusion: whether the features of students by a raised temperature moved towards similar classes.

A last stage of no steps. Every student is compared to the student of the same teachers at T = 1, never to that of
another teacher. Which classes are similar is decided by super-classes, or by a teacher's features: no student that is
compared takes part.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.distillation_setup import Setup, selected_arms, selected_teachers
from jkd import distill, train
from jkd.errors import UserError

STAGE = "diffusion"
GROUPS = ("similar", "dissimilar")
SPLITS = ("train", "test")
HELD = 32  # batches whose features are in memory at once
TAILS = (0.025, 0.975)


def references(config: ConfigDict) -> dict[str, str]:
    """For each selected arm at another temperature, the selected arm of the same teachers at T = 1."""
    arms, found = {name: config.arms[name] for name in selected_arms(config)}, {}
    for name, arm in arms.items():
        ones = [other for other, of in arms.items() if of.temperature == 1 and of.teachers == arm.teachers]
        if ones and arm.temperature != 1:
            found[name] = ones[0]
    return found


def check(config: ConfigDict, classes: int) -> None:
    """Raises UserError unless every class has similar and other classes, and what decides on them takes part."""
    c = config.diffusion
    if c.resamples < 1:
        raise UserError(f"diffusion.resamples must be >= 1, got {c.resamples}.")
    if c.superclass:
        sizes = np.unique(np.array(c.superclass, str), return_counts=True)[1]
        if len(c.superclass) != classes or len(sizes) < 2 or sizes.min() < 2:
            raise UserError(
                f"diffusion.superclass must name one of at least 2 super-classes for each of the {classes} classes, "
                f"and each of them at least twice, got {tuple(c.superclass)}."
            )
        return
    if not 1 <= c.neighbors <= classes - 2:
        raise UserError(f"diffusion.neighbors must lie in 1..{classes - 2}, the classes less 2, got {c.neighbors}.")
    here = selected_teachers(config)
    if c.reference not in here:
        raise UserError(
            f"diffusion.reference must be a teacher of this run ({', '.join(here)}), got {c.reference!r}: name one of "
            f"them, or add {c.reference!r} to config.only."
        )


def stages(setup: Setup) -> list[train.Stage]:
    """The stage that compares the students of a config, where there are some to compare."""
    config, compared = setup.config, references(setup.config)
    if not compared:
        return []
    check(config, setup.task.num_classes)
    students = tuple(dict.fromkeys((*compared.values(), *compared)))
    classes = similar_classes(setup)

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        consts = setup.task.draw(key)  # the students' rows: their stages have the same key
        published = {name: previous[name].published for name in students}
        return {**consts, "students": published, "similar": classes(previous, consts, sweep)}

    stage = train.Stage(
        STAGE,
        0,
        needs=students if config.diffusion.superclass else (*students, config.diffusion.reference),
        prepare=prepare,
        init=lambda key, previous, consts: {"similar": consts["similar"]},
        evaluators={split: evaluator(setup, compared, split) for split in SPLITS},
    )
    return [train.ensemble(stage, cls.member_keys(config), config.ensemble)]


def similar_classes(setup: Setup) -> Callable[..., jax.Array]:
    """`(previous, consts, sweep) -> bool[classes, classes]`: the classes similar to each."""
    c = setup.config.diffusion
    if c.superclass:
        numbers = np.unique(np.array(c.superclass, str), return_inverse=True)[1]
        return lambda previous, consts, sweep: distill.superclass_mask(numbers)

    def features(variables: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        out = setup.teachers[c.reference].apply(variables, setup.views["weak"].plain(batch["image"]), train=False)
        return {"pool": out.features["pool"], "label": batch["label"]}

    def nearest(previous: Mapping[str, train.Outcome], consts: Any, sweep: Callable) -> jax.Array:
        rows, size = np.asarray(consts["rows"]["train"]), setup.config.eval_batch_size
        sums = []
        for part in np.array_split(rows, -(-len(rows) // (HELD * size))):
            source = setup.task.part({"rows": {"train": part}}, "train", size)
            found = sweep(features, previous[c.reference].published, source)
            sums.append(distill.class_sums(found["pool"], found["label"], setup.task.num_classes))
        means = distill.centroids_from_sums(jax.tree.map(lambda *each: sum(each), *sums))
        return distill.similar_class_mask(means.centroids, c.neighbors, means.counts > 0)

    return nearest


def evaluator(setup: Setup, compared: Mapping[str, str], split: str) -> train.Evaluator:
    """Diffusion indices on the rows of a split: `ARM_similar` and `ARM_dissimilar` in percent, each with `_low` and
    `_high`, the 95 % interval over target classes.
    """

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        images = setup.views["weak"].plain(batch["image"])

        def sums(variables: Any) -> distill.ClassSums:
            pool = setup.student.apply(variables, images, train=False).features["pool"]
            return distill.class_sums(pool, batch["label"], setup.task.num_classes, mask)

        # `finish` sees sums over batches and nothing else.
        similar = published["similar"].astype(np.int32)
        return {"similar": similar, "students": {name: sums(one) for name, one in consts["students"].items()}}

    def finish(tree: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, reference in compared.items():
            eta = index(tree["students"][reference], tree["students"][name], tree["similar"] > 0)
            for group in GROUPS:
                numbers = over_classes(getattr(eta, group), setup.config.diffusion.resamples)
                found |= {f"{name}_{group}{end}": value for end, value in numbers.items()}
        return found

    return train.Evaluator(setup.rows(split), collect, finish)


@jax.jit
def index(reference: distill.ClassSums, student: distill.ClassSums, similar: jax.Array) -> distill.DiffusionIndex:
    """The diffusion index of every class between two students, from their sums of features."""
    present = reference.counts > 0
    centroids = [distill.centroids_from_sums(sums).centroids for sums in (reference, student)]
    before, after = (distill.centroid_distances(of, present) for of in centroids)
    return distill.diffusion_index(before, after, similar, present)


def over_classes(values: Any, resamples: int) -> dict[str, float]:
    """The mean over target classes and its bootstrap interval; classes without any pair to compare are left out."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"": np.nan, "_low": np.nan, "_high": np.nan}
    draws = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.quantile(draws, TAILS)
    return {"": float(values.mean()), "_low": float(low), "_high": float(high)}
