"""The arms of a smoothed and a plain teacher, and how their students' features moved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import QUIET, published
from sklearn.decomposition import PCA

from experiments import cli, diffusion, label_smoothing_kd, projection, train
from experiments.distillation_setup import Setup
from jkd import distill
from jkd import train as jkd_train
from jkd.errors import UserError
from jkd.train.ensemble import member
from jkd.train.lower import abstract_stages

CONFIG = "configs/label_smoothing_kd.py"
SMOKE = f"{CONFIG}:smoke"
ARMS = ("t1", "t64")
ALL = ("t1", "t2", "t3", "t8", "t64")


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """The folder of a smoke run of two arms, with the teacher of another run."""
    workdir = tmp_path_factory.mktemp("smoothing") / "run"
    arms, teacher = f"--config.only={','.join(ARMS)}", f"--config.teacher.workdir={smoke}"
    train.main(["--config", SMOKE, "--workdir", str(workdir), arms, teacher, *QUIET])
    return workdir


@pytest.fixture(scope="module")
def setup(run):
    return Setup.of(cli.load_run(str(run), {}))


# --- the run ---


def test_smoke_compares_its_students(run):
    stages = json.loads((run / "results.json").read_text())["stages"]
    assert list(stages) == ["teacher", *ARMS, "diffusion"]
    assert [stage["steps"] for stage in stages.values()] == [0, 2, 2, 0]
    names = [f"t64_{group}{end}" for group in ("similar", "dissimilar") for end in ("", "_low", "_high")]
    assert list(stages["diffusion"]["metrics"]) == [f"{split}/{name}" for split in ("train", "test") for name in names]
    assert {np.shape(values) for values in stages["diffusion"]["metrics"].values()} == {(2,)}


def features(model, variables, images, k):
    out = jax.jit(lambda v, x: model.apply(v, x, train=False))(member(variables, k), images)
    return np.asarray(out.features["pool"], np.float64)


def rows(setup, run, split, k):
    """The images and labels of a split of one seed."""
    whole = setup.task.test if split == "test" else setup.task.pool
    index = np.asarray(jkd_train.load_outcome(run, "t1").consts["rows"][split][k])
    batch = whole.read(index)
    return setup.views["weak"].plain(jnp.asarray(batch["image"])), batch["label"]


def centroids(x, labels):
    return np.stack([x[labels == c].mean(axis=0) for c in range(10)])


def nearest_two(setup, run, k):
    images, labels = rows(setup, run, "train", k)
    means = centroids(features(setup.teachers["teacher"], published(run, "teacher"), images, k), labels)
    distances = np.linalg.norm(means[:, None] - means[None], axis=-1) + np.diag(np.full(10, np.inf))
    return np.argsort(distances, axis=1)[:, :2]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_indices_are_those_of_loops_over_the_students_features(split, run, setup):
    found = json.loads((run / "results.json").read_text())["stages"]["diffusion"]["metrics"]
    near = nearest_two(setup, run, 1)
    images, labels = rows(setup, run, split, 1)
    distances = []
    for name in ("t1", "t64"):
        c = centroids(features(setup.student, published(run, name), images, 1), labels)
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in c] for a in c])
        distances.append(d / (d.sum() / 90))
    before, after = distances
    for group in ("similar", "dissimilar"):
        each = []
        for c in range(10):
            others = near[c] if group == "similar" else [k for k in range(10) if k != c and k not in near[c]]
            each.append(np.mean([100 * (before[c, k] - after[c, k]) / before[c, k] for k in others]))
        assert found[f"{split}/t64_{group}"][1] == pytest.approx(np.mean(each), abs=2e-3)


def test_similar_classes_are_found_in_parts(run, setup, monkeypatch):
    stored = np.asarray(jkd_train.load_outcome(run, "diffusion").published["similar"])
    expected = np.zeros((10, 10), bool)
    np.put_along_axis(expected, nearest_two(setup, run, 0), True, axis=1)
    assert (stored[0] == expected).all()
    monkeypatch.setattr(diffusion, "HELD", 1)
    setup, sizes = Setup.of(cli.load_run(str(run), {"eval_batch_size": 16})), []

    def sweep(fn, args, source):
        sizes.append(source.num_examples)
        return jkd_train.sweep(fn, args, source, mesh=jkd_train.make_mesh())

    variables = member(jkd_train.load_outcome(run, "teacher").published, 0)
    consts = member(jkd_train.load_outcome(run, "diffusion").consts, 0)
    previous = {"teacher": jkd_train.Outcome(variables, {}, {}, {})}
    found = diffusion.similar_classes(setup)(previous, consts, sweep)
    assert sizes == [14, 13, 13]
    assert (np.asarray(found) == expected).all()


def test_seeds_one_after_another_measure_the_same(run):
    config = cli.load_run(str(run), {})
    config.ensemble = "loop"
    stage = label_smoothing_kd.stages(config)[-1]
    outcome = jkd_train.load_outcome(run, "diffusion")
    found = jkd_train.evaluate_outcome(stage, outcome)
    assert stage.looped
    assert set(found) == set(outcome.metrics)
    for name, values in found.items():
        np.testing.assert_allclose(values, outcome.metrics[name], atol=1e-3)


# --- the index ---


def sums(*centroids):
    count = 5
    total = count * np.array(centroids, np.float32)
    return distill.ClassSums(total, np.full(len(centroids), count, np.int32))


def test_an_index_by_hand():
    similar = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    eta = diffusion.index(sums((0, 0), (1, 0), (0, 4)), sums((0, 0), (0.5, 0), (0, 4)), similar)
    assert float(eta.similar[0]) == pytest.approx(46.530490, rel=1e-5)
    assert float(eta.dissimilar[0]) == pytest.approx(-6.939020, rel=1e-5)
    # The last class has no similar one, and is left out of the mean.
    assert diffusion.over_classes(eta.similar, 10)[""] == pytest.approx(46.530490, rel=1e-5)


def test_a_class_without_examples_takes_no_part():
    similar = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]], bool)
    before, after = sums((0, 0), (1, 0), (0, 4), (9, 9)), sums((0, 0), (0.5, 0), (0, 4), (0, 0))
    counts = np.array([5, 5, 5, 0], np.int32)
    eta = diffusion.index(before._replace(counts=counts), after._replace(counts=counts), similar)
    assert float(eta.similar[0]) == pytest.approx(46.530490, rel=1e-5)
    assert np.isnan(np.asarray(eta.similar)[2:]).all()


def test_intervals_are_over_classes():
    values = np.random.RandomState(0).standard_normal(400) + 3
    found = diffusion.over_classes(values, 2000)
    half = 1.96 * values.std() / 20
    assert found[""] == pytest.approx(values.mean())
    assert found["_low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["_high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == diffusion.over_classes([*values, np.nan], 2000)
    assert all(np.isnan(value) for value in diffusion.over_classes([np.nan], 10).values())


# --- what is compared ---


def test_students_are_compared_to_the_first_temperature_of_their_own_teacher():
    config = cli.load_config(CONFIG)
    own = dict.fromkeys(ALL[1:], "t1") | {f"smooth_{name}": "smooth_t1" for name in ALL[1:]}
    assert diffusion.references(config) == own
    config.only = ("t1", "smooth_t8", "t3")
    assert diffusion.references(config) == {"t3": "t1"}
    config.only = ("t3", "t8", "smooth_t1")
    assert diffusion.references(config) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"only": "smooth_t1,smooth_t8"}, "diffusion.reference must be a teacher of this run (smooth), got 'teacher'"),
        (
            {"diffusion.reference": "t1"},
            "diffusion.reference must be a teacher of this run (smooth, teacher)",
        ),
        ({"diffusion.neighbors": "0"}, "diffusion.neighbors must lie in 1..8, the classes less 2, got 0."),
        ({"diffusion.neighbors": "9"}, "diffusion.neighbors must lie in 1..8, the classes less 2, got 9."),
        ({"diffusion.resamples": "0"}, "diffusion.resamples must be >= 1, got 0."),
        ({"diffusion.superclass": "a,a,b,b"}, "at least 2 super-classes for each of the 10 classes"),
        ({"diffusion.superclass": "a,a,a,a,a,a,a,a,a,a"}, "at least 2 super-classes"),
        ({"diffusion.superclass": "a,a,a,a,a,a,a,a,a,b"}, "each of them at least twice"),
        ({"arms.t2.temperature": "0"}, "arms.t2.temperature must be finite and > 0, got 0.0."),
    ],
)
def test_runs_that_could_not_be_compared(changes, says, refused, untouched):
    options = [f"--config.{name}={value}" for name, value in changes.items()]
    assert says in refused(train.main, "--config", SMOKE, "--workdir", untouched() / "run", *options)


def test_a_chosen_reference_and_named_super_classes():
    config = cli.load_config(SMOKE, {"only": "smooth_t1,smooth_t8", "diffusion.reference": "smooth"})
    assert label_smoothing_kd.stages(config)[-1].needs == ("smooth_t1", "smooth_t8", "smooth")
    config = cli.load_config(SMOKE, {"only": "smooth_t1,smooth_t8", "diffusion.superclass": "a,b,a,b,a,b,a,b,a,b"})
    setup = Setup.of(config)
    assert label_smoothing_kd.stages(config)[-1].needs == ("smooth_t1", "smooth_t8")
    similar = np.asarray(diffusion.similar_classes(setup)({}, {}, None))
    assert similar.sum() == 40
    assert similar[0].nonzero()[0].tolist() == [2, 4, 6, 8]


# --- the shipped configs ---


def test_plans_know_the_last_stage():
    config = cli.load_config(SMOKE, {"data.blank": True, "only": "t1,t64"})
    stages = label_smoothing_kd.stages(config)
    last = list(abstract_stages(stages, jkd_train.make_mesh()))[-1]
    assert last.stage.name == "diffusion"
    assert last.plan.consts["similar"].shape == (2, 10, 10)


@pytest.mark.parametrize("variant", ["default", "hierarchy", "cifar100", "imagenet", "cub200_resnet50_mobilenet_v2"])
def test_every_variant_builds_its_stages(variant):
    config = cli.load_config(f"{CONFIG}:{variant}", {"data.blank": True, "data.strong.policy": "none"})
    stages = {stage.name: stage for stage in label_smoothing_kd.stages(config)}
    assert set(stages) == {"teacher", "smooth", *ALL, *(f"smooth_{name}" for name in ALL), "diffusion"}
    assert stages["smooth_t8"].needs == ("smooth",)
    assert list(stages)[-1] == "diffusion"
    steps = {"default": 625, "hierarchy": 1406, "cifar100": 187500, "imagenet": 1000912}
    assert stages["t3"].num_steps == steps.get(variant, 4683)


ARM = {"weights.kd": 1.0, "weights.ce": 0.0}
BOTH = {
    "batch_size": 256,
    "teacher.model": "resnet50",
    "student.model": "resnet18",
    "teacher.epochs": 90.0,
    "teacher.milestones": (30, 60),
    "teacher.weight_decay": 1e-4,
    "teacher.smoothing": 0.0,
    "teachers.smooth.smoothing": 0.1,
    **{f"{who}.schedule": "steps" for who in ("teacher", "student")},
    **{f"{who}.momentum": 0.9 for who in ("teacher", "student")},
    **{f"arms.{name}.temperature": float(name.rpartition("t")[2]) for name in ("t1", "t3", "smooth_t2", "smooth_t64")},
    **{f"arms.smooth_t3.{name}": value for name, value in ARM.items()},
    "arms.t1.epochs": 200.0,
    "arms.smooth_t64.milestones": (80, 160),
    "arms.t1.teachers": ("teacher",),
    "arms.smooth_t1.teachers": ("smooth",),
    "data.image_size": 224,
    "data.weak.flip": True,
}
IMAGENET = {**BOTH, "teacher.lr": 0.1, "arms.t2.lr": 0.1, "student.warmup_epochs": 5.0, "student.weight_decay": 1e-4}
CUB = {**BOTH, "teacher.lr": 0.01, "arms.t2.lr": 0.01, "student.warmup_epochs": 0.0, "student.weight_decay": 1e-3}


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("imagenet", IMAGENET),
        ("imagenet_resnet50_resnet50", {**IMAGENET, "student.model": "resnet50"}),
        ("cub200", {**CUB, "data.name": "caltech_birds2011", "data.num_classes": 200}),
        ("cub200_resnet50_mobilenet_v2", {**CUB, "student.model": "mobilenet_v2"}),
    ],
)
def test_settings_of_the_paper(variant, settings):
    config = cli.flatten(cli.load_config(f"{CONFIG}:{variant}").to_dict())
    assert {name: config[name] for name in settings} == settings


def test_super_classes():
    superclass = np.array(cli.load_config(f"{CONFIG}:cifar100").diffusion.superclass)
    assert np.bincount(superclass).tolist() == [5] * 20
    assert np.flatnonzero(superclass == superclass[4]).tolist() == [4, 30, 55, 72, 95]  # the aquatic mammals
    assert np.flatnonzero(superclass == superclass[0]).tolist() == [0, 51, 53, 57, 83]  # fruit and vegetables


def test_the_shipped_studies_name_what_their_stages_measure():
    digits, hierarchy = label_smoothing_kd.STUDIES
    for study in (digits, hierarchy):
        config = cli.load_config(study.config, {"only": tuple(study.arms)})
        compared = diffusion.references(config)
        known = {*config.arms, *config.teachers} if study.rates else set()
        known |= {
            ("diffusion", f"{split}/{name}_{group}")
            for split in diffusion.SPLITS
            for name in compared
            for group in diffusion.GROUPS
        }
        for claim in study.claims:
            sides = [claim.value] if claim.value else [claim.better, claim.worse]
            assert {one for side in sides for one in (side if isinstance(side, list) else [side])} <= known


# --- pictures ---


def test_a_picture_is_that_of_the_stages_rows(run, setup):
    classes = [4, 9, 1]
    picture = projection.project(setup.config, str(run), "t64", classes, seed=1)
    assert np.bincount(picture.test_labels, minlength=10)[classes].tolist() == [50, 50, 50]
    images, labels = rows(setup, run, "train", 1)
    pick = np.concatenate([np.flatnonzero(labels == c) for c in classes])
    assert picture.train_labels.tolist() == labels[pick].tolist()
    x = features(setup.student, published(run, "t64"), images, 1)[pick]
    head = member(published(run, "t64")["params"]["head"], 1)
    basis = np.linalg.qr(np.vstack([head["kernel"][:, classes], head["bias"][None, classes]]))[0]
    points = np.column_stack([x, np.ones(len(x))]) @ basis
    middles = np.stack([points[labels[pick] == c].mean(axis=0) for c in classes])
    pca = PCA(2).fit(np.vstack([points, middles]))
    # The signs of axes are free.
    np.testing.assert_allclose(np.abs(picture.plane.train), np.abs(pca.transform(points)), atol=1e-4)
    np.testing.assert_allclose(np.abs(picture.plane.centroids), np.abs(pca.transform(middles)), atol=1e-4)


def test_the_command_draws_a_png(run, tmp_path, capsys):
    file = tmp_path / "t64.png"
    options = ["--stage", "t64", "--classes", "4, 9,1", "--output", str(file)]
    projection.main(["--workdir", str(run), *options])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "test rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--classes", "4", "--classes takes at least 2 different numbers of classes, such as 4,9,1; got '4'."),
        ("--classes", "4,4", "got '4,4'."),
        ("--classes", "4,x", "got '4,x'."),
        ("--classes", "4,10", "--classes must be below 10, the number of classes, got 10."),
        ("--stage", "diffusion", "Stage 'diffusion' compares features and holds no model"),
        ("--stage", "teacher", "Stage 'teacher' has no rows of its own: it was trained in another run"),
        ("--stage", "t46", "holds no finished stage 't46'"),
        ("--seed", "2", "--seed must be one of 0..1, got 2."),
        ("--output", "t64.jpg", "--output must end in .png, got"),
    ],
)
def test_pictures_that_cannot_be_drawn(option, value, says, run, refused, untouched):
    options = {"--workdir": run, "--stage": "t64", "--classes": "4,9", "--output": "p.png", option: value}
    options["--output"] = untouched() / options["--output"]
    assert says in refused(projection.main, *(word for pair in options.items() for word in pair))


def test_a_class_without_examples_cannot_be_drawn(setup):
    part = setup.task.pool.subset(np.flatnonzero(setup.task.pool.labels != 3))
    with pytest.raises(UserError, match="Class 3 has no example"):
        projection.chosen(part, [1, 3], 5)
