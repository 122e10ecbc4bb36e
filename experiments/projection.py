"""Draws the penultimate features of a few classes: the plane that their rows of the last layer span, as a picture.

    python -m experiments.projection --workdir runs/label_smoothing_kd --stage smooth_t1 --classes 4,9,1 --output t1.png

The stage's own training and test rows of these classes, at most 150 and 50 of each, are projected on the classes'
weights and biases, and then on the two main axes of the training rows. Take two similar classes and another.

--config.NAME=VALUE sets mesh.*, loop.*, eval_batch_size and data.data_dir only.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import classification as cls
from experiments import cli
from jkd import data, distill, train
from jkd.errors import UserError
from jkd.train.ensemble import member
from jkd.train.log import console
from jkd.train.mesh import check_batch_size
from jkd.train.passes import Residents
from jkd.train.workdir import write_bytes

EXAMPLES = {"train": 150, "test": 50}  # of each class, as the authors


class Picture(NamedTuple):
    """Points of both splits, the centroid of each class, and the classes of the points."""

    plane: distill.HeadPlane
    train_labels: np.ndarray
    test_labels: np.ndarray


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    parser.add_argument("--workdir", required=True, help="the folder of a run; gs:// works")
    parser.add_argument("--stage", required=True, metavar="NAME", help="a finished stage of it")
    parser.add_argument("--classes", required=True, metavar="A,B,C", help="numbers of at least 2 classes")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="a new file")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of an ensemble: 0, 1, ..")
    args, overrides = cli.parse(parser, argv)
    config = cli.load_run(args.workdir, overrides)
    classes = parse_classes(args.classes)
    if not args.output.endswith(".png"):
        raise UserError(f"--output must end in .png, got {args.output!r}.")
    output = cli.new_file(args.output)
    cli.use_compilation_cache()
    picture = project(config, args.workdir, args.stage, classes, args.seed)
    write_bytes(output, draw(picture, classes, f"{args.stage} (seed {args.seed})"))
    counts = [len(labels) for labels in (picture.train_labels, picture.test_labels)]
    console.print(f"Drew {counts[0]} training and {counts[1]} test rows: {output}", soft_wrap=True)


def parse_classes(text: str) -> list[int]:
    """The numbers in `A,B,C`.

    Raises:
      UserError: unless they are at least 2 different ones.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({int(word) for word in words}) < max(2, len(words)):
        raise UserError(f"--classes takes at least 2 different numbers of classes, such as 4,9,1; got {text!r}.")
    return [int(word) for word in words]


def project(config: Any, workdir: str, stage: str, classes: Sequence[int], seed: int = 0) -> Picture:
    """The picture of one seed of a stage.

    Raises:
      UserError: for a stage, seed or class that is not there, or a stage without rows of its own.
    """
    mesh = train.make_mesh(**config.mesh)
    check_batch_size(config.eval_batch_size, mesh, "eval_batch_size")
    outcome = one_seed(train.load_outcome(workdir, stage, mesh=mesh), seed)
    predictor = cli.experiment(config).predictor(config, stage)
    predictor.check(outcome.published)
    if "rows" not in outcome.consts:
        raise UserError(f"Stage {stage!r} has no rows of its own: it was trained in another run, which can be drawn.")
    task, residents = cls.load_task(config), Residents(mesh)
    if max(classes) >= task.num_classes:
        raise UserError(f"--classes must be below {task.num_classes}, the number of classes, got {max(classes)}.")

    def features(published: Any, batch: Any, key: Any) -> Any:
        return predictor(published, batch["image"])["pool"]

    found, labels = {}, {}
    for split, whole in (("train", task.pool), ("test", task.test)):
        part = chosen(whole.subset(np.asarray(outcome.consts["rows"][split])), classes, EXAMPLES[split])
        source = data.source(part, config.eval_batch_size)
        found[split] = train.sweep(features, outcome.published, source, mesh=mesh, residents=residents)
        labels[split] = part.labels
    head = outcome.published["params"]["head"]
    basis = distill.head_plane_basis(head["kernel"], head["bias"], classes)
    plane = distill.head_plane(found["train"], labels["train"], found["test"], basis, classes)
    return Picture(plane, labels["train"], labels["test"])


def one_seed(outcome: train.Outcome, seed: int) -> train.Outcome:
    """One member of an ensemble, or the single run.

    Raises:
      UserError: for a seed that is not there.
    """
    count = max(outcome.members, 1)
    if not 0 <= seed < count:
        raise UserError(f"--seed must be one of 0..{count - 1}, got {seed}.")
    return dataclasses.replace(member(outcome, seed), members=0) if outcome.members else outcome


def chosen(part: data.Dataset, classes: Sequence[int], count: int) -> data.Dataset:
    """The first examples of each class.

    Raises:
      UserError: for a class without any.
    """
    rows = [np.flatnonzero(part.labels == one)[:count] for one in classes]
    for one, of in zip(classes, rows, strict=True):
        if not len(of):
            raise UserError(f"Class {one} has no example among these rows of {part.name!r}: leave it out of --classes.")
    return part.subset(np.concatenate(rows))


def draw(picture: Picture, classes: Sequence[int], title: str) -> bytes:
    """A PNG: dots for training rows, crosses for test rows, a star for each training centroid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    plane = [np.asarray(points) for points in picture.plane]
    for i, one in enumerate(classes):
        train_rows, test_rows = plane[0][picture.train_labels == one], plane[1][picture.test_labels == one]
        axes.plot(*train_rows.T, ".", ms=4, alpha=0.5, color=f"C{i}", label=f"class {one}")
        axes.plot(*test_rows.T, "x", ms=5, color=f"C{i}")
        axes.plot(*plane[2][i], "*", ms=14, color=f"C{i}", mec="k")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(title="dots: train, crosses: test")
    axes.set_title(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    cli.command(main)
