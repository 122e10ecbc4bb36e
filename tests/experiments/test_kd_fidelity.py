"""KD fidelity: the shipped smoke run, its measures against direct numpy, its grid, the settings of the paper."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import QUIET
from scipy.special import log_softmax, softmax

from experiments import classification, cli, kd_fidelity, studies, train
from experiments.distillation_setup import Setup
from jkd import data, nn
from jkd.errors import UserError

SMOKE = "configs/kd_fidelity.py:smoke"
ARM, SMOKE_ARM = "T1w_T2s_Ss", "T1w_Ss"
ONE_BATCH = "--config.eval_batch_size=504"  # adding up batches would be a second program of every evaluator


# --- the smoke run ---


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smoke")
    train.main(["--config", SMOKE, "--workdir", str(workdir), f"--config.only={SMOKE_ARM}", ONE_BATCH, *QUIET])
    return json.loads((workdir / "results.json").read_text())["stages"]


def test_smoke_trains_the_teacher_of_its_arm_and_measures_its_student(stages):
    assert list(stages) == ["t1_weak", SMOKE_ARM]
    found = stages[SMOKE_ARM]["metrics"]
    looks = ("top1", "fidelity", "mutual_information", "entropy", "kl", "ece", "blank", "iou_T1_S")
    names = {f"looks/{look}_{name}" for look in ("clean", "augmented") for name in looks}
    assert names | {"looks/affinity", "train/clean_top1", "train/augmented_top1"} <= set(found)
    assert all(np.isfinite(found[name]).all() and np.shape(found[name]) == (2,) for name in names)
    for name in ("fidelity", "mutual_information", "kl", "entropy", "ece"):
        np.testing.assert_allclose(found[f"looks/clean_{name}"], found[f"agreement/{name}"], rtol=1e-5)
    np.testing.assert_allclose(found["looks/clean_top1"], found["test/top1"])
    assert found["looks/clean_kl"] != found["looks/augmented_kl"]


# --- measures ---


@pytest.fixture(scope="module")
def setup():
    return Setup.of(cli.load_config(SMOKE))


@pytest.fixture(scope="module")
def networks(setup):
    """A student and two teachers that differ in what they predict and where they look."""
    models = {"student": setup.network, **setup.teachers}
    names = ("student", "t1_weak", "t2_strong")
    return {n: (models[n], nn.init(models[n], jax.random.key(i), setup.task.shape)) for i, n in enumerate(names)}


@pytest.fixture(scope="module")
def batches(setup):
    """16 test rows, as two batches."""
    rows = setup.task.part({"rows": {"test": np.arange(16)}}, "test", 16).batch(0)
    return [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], rows) for i in range(2)]


@pytest.fixture(scope="module")
def looks(setup):
    return jax.jit(functools.partial(kd_fidelity.looks, setup, setup.config.arms[ARM]))


@pytest.fixture(scope="module")
def measured(setup, networks, batches):
    """The metrics of the first 11 rows: the second batch counts as padded."""
    arm = setup.config.arms[ARM]
    evaluator = kd_fidelity.looks_evaluator(setup, arm)
    consts = {"teachers": {name: networks[name][1] for name in arm.teachers}}
    collect = jax.jit(evaluator.collect)
    sums = [
        collect(networks["student"][1], consts, one, np.arange(8) < n) for one, n in zip(batches, (8, 3), strict=True)
    ]
    return evaluator.finish(jax.tree.map(lambda *xs: np.sum(np.stack(xs), axis=0), *jax.device_get(sums)))


@pytest.fixture(scope="module")
def outs(networks):
    """The outputs of all networks for images."""
    return jax.jit(lambda images: {name: model.apply(v, images) for name, (model, v) in networks.items()})


def mask_of(features, head, side):
    """Class activation maps summed over classes, resized, and the part above 0.4 of their range: pixel by pixel."""
    kernel, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))
    small = (np.asarray(features, np.float64) @ kernel + bias).sum(-1)
    n = small.shape[1]
    at = np.clip((np.arange(side) + 0.5) * n / side - 0.5, 0, n - 1)
    rows = np.stack([np.interp(at, np.arange(n), row) for row in np.eye(n)], axis=1)  # [side, n]
    maps = rows @ small @ rows.T
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return (maps - low) / (high - low + 1e-8) > 0.4


@pytest.mark.parametrize("look", ["clean", "augmented"])
def test_measures_equal_direct_ones(look, networks, batches, looks, outs, measured):
    found, labels = measured, np.concatenate([one["label"] for one in batches])[:11]
    seen = [jax.device_get(outs(looks(one)[look])) for one in batches]
    joined = jax.tree.map(lambda *xs: np.concatenate(xs)[:11], *seen)
    student, *teachers = (np.asarray(out.logits, np.float64) for out in (joined[name] for name in networks))
    mean = np.mean(teachers, axis=0)
    log_p, log_q = log_softmax(mean, axis=1), log_softmax(student, axis=1)
    expected = {
        "top1": 100 * np.mean(student.argmax(1) == labels),
        "fidelity": 100 * np.mean(student.argmax(1) == mean.argmax(1)),
        "kl": np.mean((softmax(mean, axis=1) * (log_p - log_q)).sum(1)),
        "entropy": -np.mean((softmax(student, axis=1) * log_q).sum(1)),
    }
    masks = {
        name: mask_of(joined[name].features["block2"], networks[name][1]["params"]["head"], 8) for name in networks
    }
    letters = {"T1": "t1_weak", "T2": "t2_strong", "S": "student"}
    for names in (("T1", "T2"), ("T1", "S"), ("T2", "S"), ("T1", "T2", "S")):
        every = np.stack([masks[letters[name]] for name in names])
        expected[f"iou_{'_'.join(names)}"] = 100 * every.all(0).sum() / every.any(0).sum()
    assert {name: found[f"{look}_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["affinity"] == pytest.approx(found["augmented_top1"] / max(found["clean_top1"], 1e-9))
    assert len({round(expected[name], 3) for name in expected if name.startswith("iou")}) > 2


def test_looks_do_not_depend_on_the_batch(batches, looks):
    first, second = (looks(one) for one in batches)
    both = looks(jax.tree.map(lambda a, b: jnp.concatenate([a[4:], b[:4]]), *batches))
    np.testing.assert_array_equal(both["augmented"], [*first["augmented"][4:], *second["augmented"][:4]])
    assert np.abs(np.asarray(first["augmented"] - first["clean"])).max() > 0.5


# --- the grid ---


def made_up(gap, iou):
    """A student's metrics on two seeds."""
    look = {"fidelity": [90 + iou, 91 + iou], "mutual_information": [1.0, 2.0], "iou_T1_T2": [iou, iou + 1]}
    looks = {f"looks/{name}_{metric}": v for name in ("clean", "augmented") for metric, v in look.items()}
    rows = {"train/clean_top1": [95, 96], "train/augmented_top1": [93, 94], "test/top1": [95 - gap, 96 - 2 * gap]}
    return {"metrics": {**looks, **rows, "looks/affinity": [0.9, 1.0]}}


def test_the_grid_by_hand():
    settings = {"T1w_T2w_Sw": (4, 6), "T1s_T2s_Sw": (2, 5), "T1w_T2w_Ss": (1, 3), "T1s_T2s_Ss": (3, 2)}
    stages = {name: made_up(*values) for name, values in settings.items()}
    found = kd_fidelity.grid({**stages, "T1w_Sw": {"metrics": {}}, "t1_weak": {"metrics": {}}})
    weak, strong = (found[name]["metrics"] for name in ("Sw", "Ss"))
    assert (weak["gap"], strong["gap"]) == ([3, 6], [2, 4])
    assert (weak["augmented_gap"], strong["augmented_iou"]) == ([1, 4], [2.5, 3.5])
    assert found["grid"]["metrics"]["augmented_iou~augmented_fidelity"] == [1, 1]
    # Ranks of the overlaps 4 3 2 1, of the accuracies (91, 93, 94, 92) 1 3 4 2: 1 - 6 (9 + 0 + 4 + 1) / 60.
    assert found["grid"]["metrics"]["augmented_iou~accuracy"] == pytest.approx([-0.4, -0.4])
    rows = studies.judge_all(kd_fidelity.CLAIMS, found)
    assert len(rows) == len(kd_fidelity.CLAIMS)


def test_a_grid_without_order_correlates_with_nothing():
    same = {name: made_up(1, 2) for name in ("T1w_T2w_Sw", "T1w_T2w_Ss")}
    assert set(kd_fidelity.grid(same)["grid"]["metrics"]["clean_iou~clean_fidelity"]) == {0.0}


# --- settings ---


def test_arms_are_all_settings():
    config = cli.load_config("configs/kd_fidelity.py")
    assert len(config.arms) == 4 + 8
    assert {name: config.teachers[name].to_dict() for name in config.teachers} == {
        "t1_weak": {"view": "weak", "replica": 0},
        "t1_strong": {"view": "strong", "replica": 0},
        "t2_weak": {"view": "weak", "replica": 1},
        "t2_strong": {"view": "strong", "replica": 1},
    }
    large = cli.load_config("configs/kd_fidelity.py:cifar100")
    assert len(large.arms) == 4 + 8 + 16
    arm = large.arms.T1w_T2s_T3w_Ss
    assert (arm.teachers, arm.view) == (("t1_weak", "t2_strong", "t3_weak"), "strong")
    for arms in (config.arms, large.arms):
        for arm in arms.values():
            assert (arm.weights.ce, arm.weights.kd, sum(arm.weights.values()), arm.temperature) == (0.6, 0.4, 1.0, 3.0)
    assert set(kd_fidelity.PAIRS) <= set(config.arms)


@pytest.mark.parametrize(
    ("variant", "teacher", "student", "imbalance"),
    [
        ("cifar100", ("steps", 61.0, (25, 40, 60)), ("steps", 200.0, (190, 195)), 1.0),
        ("cifar100_lt", ("steps", 61.0, (55,)), ("steps", 175.0, (160, 165, 170)), 100.0),
        ("imagenet_lt", ("steps", 60.0, (35, 50)), ("steps", 165.0, (150, 155, 160)), 256.0),
        ("imagenet", ("steps", 60.0, (35, 50)), ("cosine", 60.0, None), 1.0),
    ],
)
def test_settings_of_the_paper(variant, teacher, student, imbalance):
    config = cli.load_config(f"configs/kd_fidelity.py:{variant}")
    assert (config.teacher.schedule, config.teacher.epochs, config.teacher.milestones) == teacher
    schedule, epochs, milestones = student
    for arm in config.arms.values():
        assert (config.student.schedule, arm.epochs, arm.lr) == (schedule, epochs, 0.1)
        assert milestones in (None, arm.milestones)
    for net, model in ((config.teacher, "resnet50"), (config.student, "resnet18")):
        assert (net.model, net.momentum, net.weight_decay, net.warmup_epochs) == (model, 0.9, 0.0, 8.0)
    assert (config.batch_size, config.teacher.lr, config.data.imbalance) == (128, 0.1, imbalance)
    assert 224 in (config.data.resize, config.data.image_size)


def test_views_of_the_paper_come_in_its_size():
    config = cli.load_config("configs/kd_fidelity.py:cifar100", {"data.resize": 48, "data.strong.policy": "none"})
    views = classification.make_views(config)
    images = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3))
    images = jnp.asarray(images, jnp.uint8)
    for seen in views.values():
        assert jax.eval_shape(seen.train, jax.random.key(0), images).shape == (2, 48, 48, 3)
    plain = data.normalize(data.resize(images, 48), config.data.mean, config.data.std)
    np.testing.assert_allclose(views["strong"].plain(images), plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher.source": "cached"}, "kd_fidelity looks into its teachers: set teacher.source=live."),
        ({"student.model": "mlp"}, "attention needs a network with feature maps"),
        ({"data.resize": -1}, "data.resize must be >= 0 pixels, got -1."),
        ({"data.weak.rotation": -1.0}, "data.weak.rotation must be >= 0, got -1.0."),
        ({"data.weak.crop": 1.5}, r"data.weak.crop must lie in \[0, 1\], got 1.5."),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        kd_fidelity.stages(cli.load_config(SMOKE, {"only": (ARM,), **changes}))
