"""Arms of the shipped configs beside those of Energy KD: what they compute, and that they run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import QUIET, published

from experiments import arms, cli, train
from experiments.distillation_settings import CIFAR_PAIRS, IMAGENET_PAIRS, PAIRS, VARIANTS, arm
from jkd import distill, nn

TEACHER = jnp.array([[3, 1, 0, -1], [0, 2, 1, 4.0]])
SECOND = jnp.array([[2, 1, 0, 0], [1, 1, 1, 3.0]])
STUDENT = jnp.array([[2, 0, 1, -1], [1, 2, 0, 3.0]])
LABELS = jnp.array([0, 3])
CE = float(distill.cross_entropy(STUDENT, LABELS))


def loss(made, teachers=None, consts=None):
    found = arms.objective(made, 10.0)(STUDENT, teachers or {"teacher": TEACHER}, LABELS, consts or {}, 10**6)
    return float(found)


def test_terms_add_up_to_the_losses_of_the_papers():
    assert loss(arm({"ce": 1, "cosine": 2, "cswt": 2})) == pytest.approx(
        float(distill.cskd_loss(STUDENT, TEACHER, LABELS)), rel=1e-6
    )
    assert loss(arm({"ce": 1, "cosine": 2})) == pytest.approx(
        float(distill.cskd_loss(STUDENT, TEACHER, LABELS, use_cswt=False)), rel=1e-6
    )
    # Worked out by hand: the value loss is 1.023485, the rank loss .4.
    assert loss(arm({"value": 2})) == pytest.approx(1.023485, rel=1e-5)
    assert loss(arm({"ce": 1, "value": 2, "rank": 2})) == pytest.approx(CE + 1.423485, rel=1e-5)
    mixed = distill.mix_teacher_logits(TEACHER, SECOND)
    assert loss(arm({"value": 2}), {"teacher": mixed}) == pytest.approx(0.849005, rel=1e-5)
    soft = float(distill.spearman_loss(STUDENT, TEACHER, weight=2.0, rank_mode="soft", tau=0.5))
    assert loss(arm({"rank": 2}, rank_mode="soft", tau=0.5)) == pytest.approx(soft, rel=1e-6)


def test_several_teachers_count_equally():
    both = {"teacher": TEACHER, "second": SECOND}
    made = arm({"ce": 0.6, "kd": 0.4}, temperature=3.0, teachers=("teacher", "second"))
    expected = distill.ensemble_kd_loss(STUDENT, jnp.stack([TEACHER, SECOND]), LABELS)
    assert loss(made, both) == pytest.approx(float(expected), rel=1e-6)


def test_every_teacher_has_temperatures_of_its_own():
    both = {"teacher": TEACHER, "second": SECOND}
    limits = {name: {"low": jnp.float32(-6.7), "high": jnp.float32(-6.4)} for name in both}
    made = arm({"cosine": 1}, temperatures="energy", teachers=tuple(both))
    each = []
    for logits in both.values():
        rule = distill.energy_temperature(distill.energy_score(logits), -6.7, -6.4)
        each.append(float(distill.batch_cosine_loss(STUDENT, logits, rule, weight=1.0)))
    assert each[0] != each[1]
    assert loss(made, both, {"thresholds": limits}) == pytest.approx(np.mean(each), rel=1e-6)


def test_two_views_are_one_loss_of_both():
    made = arm({"two_view": 1}, mix="all", mixer="strong", mask_mode="select")
    found = arms.two_view_loss(made, (STUDENT, STUDENT + 1), ({"a": TEACHER}, {"a": SECOND}), LABELS)
    expected = distill.cskd_two_view_loss(STUDENT, STUDENT + 1, TEACHER, SECOND, LABELS, mask_mode="select")
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


RUNS = {
    "cosine_kd": ("cskd_cswt", "cskd_two_view"),
    "r2kd": ("r2kd_soft", "r2kd_cutmix"),
    "composed_distillation": ("everything",),
}


@pytest.mark.parametrize("method", RUNS)
def test_the_smoke_variant_runs(method, smoke, tmp_path):
    only = f"--config.only={','.join(RUNS[method])}"
    two = method == "composed_distillation"
    teacher = () if two else (f"--config.teacher.workdir={smoke}",)
    config = f"configs/{method}.py:smoke"
    train.main(["--config", config, "--workdir", str(tmp_path / "run"), only, *teacher, *QUIET])
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    assert list(stages) == [*(["second"] if two else []), "teacher", *RUNS[method]]
    for name in RUNS[method]:
        assert all(np.shape(values) == (2,) for values in stages[name]["metrics"].values())
        assert {"agreement/fidelity", "agreement/class_cosine", "agreement/ece"} <= set(stages[name]["metrics"])
    if two:
        first, second = (published(tmp_path / "run", name) for name in ("teacher", "second"))
        assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


# --- configs ---

METHODS = ("energy_kd", "cosine_kd", "r2kd", "composed_distillation")


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_is_a_variant_with_known_models(method):
    for variant, (data, pair) in PAIRS.items():
        config = cli.load_config(f"configs/{method}.py:{variant}")
        teacher, student = pair.split("-")
        assert (config.teacher.model, config.student.model) == (teacher, student)
        assert {teacher, student} <= set(nn.names())
        assert config.data.num_classes == {"cifar100": 100, "imagenet": 1000}[data]
        arms.check(config)
    assert len(CIFAR_PAIRS) == 11
    assert len(IMAGENET_PAIRS) == 2
    assert set(VARIANTS) == {"default", "smoke", "hard", *PAIRS}


def test_settings_of_the_cosine_paper():
    config = cli.load_config("configs/cosine_kd.py:cifar100")
    assert dict(config.arms.cskd_cswt.weights) | {"ce": 1.0, "cosine": 2.0, "cswt": 2.0} == dict(
        config.arms.cskd_cswt.weights
    )
    two = config.arms.cskd_two_view
    assert (two.epochs, two.lr, two.milestones) == (480.0, 0.025, (150, 180, 210))
    assert (config.arms.cskd.epochs, config.arms.cskd.lr, config.batch_size) == (240.0, 0.05, 64)
    light = cli.load_config("configs/cosine_kd.py:cifar100_vgg13_mobilenet_v2_cifar").arms
    assert (light.cskd.lr, light.cskd_two_view.lr) == (0.01, 0.01)


def test_settings_of_r2kd():
    config = cli.load_config("configs/r2kd.py:tiny_imagenet")
    made = config.arms.r2kd_cutmix
    assert (made.epochs, made.lr, made.prune_rate, made.teacher_weight) == (240.0, 0.05, 0.1, 0.7)
    assert (made.weights.ce, made.weights.value, made.weights.rank, made.temperature) == (1.0, 2.0, 2.0, 4.0)
    assert (config.data.weak.pad_crop, config.data.shape, config.data.num_classes) == (8, (64, 64, 3), 200)
    imagenet = cli.load_config("configs/r2kd.py:imagenet").arms
    assert (imagenet.kd.weights.ce, imagenet.kd.weights.kd, imagenet.kd.temperature) == (0.5, 0.5, 1.0)
    assert (imagenet.r2kd.temperature, imagenet.r2kd.lr, imagenet.r2kd.epochs) == (4.0, 0.2, 100.0)


WRONG = {
    "arms.kd.teachers=techer": "Unknown teacher in arms.kd.teachers 'techer'. Did you mean 'teacher'?",
    "arms.kd.weights.kd=0,arms.kd.weights.ce=0": "arms.kd.weights are all 0: there is no loss.",
    "arms.r2kd.prune_rate=1.5": "arms.r2kd.prune_rate must lie in [0, 1], got 1.5.",
    "arms.kd.mixer=cutmx": "Unknown arms.kd.mixer 'cutmx'. Did you mean 'cutmix'?",
    "arms.kd.weights.two_view=1": "arms.kd.weights.two_view compares two views of all images",
    "arms.ce.mix=all": "arms.ce.weights: mix='all' needs a weight > 0 for one of kd, cosine, cswt, value, rank, two",
    "teacher.smoothing=1.5": "teacher.smoothing must lie in [0, 1], got 1.5.",
    "teacher.source=cached": "arms.kd_cutmix mixes images, which cached logits do not cover",
}


@pytest.mark.parametrize("changes", WRONG)
def test_mistakes(changes, refused, untouched):
    given = [f"--config.{change}" for change in changes.split(",")]
    workdir = untouched() / "run"
    assert WRONG[changes] in refused(train.main, "--config", "configs/r2kd.py:smoke", "--workdir", workdir, *given)
