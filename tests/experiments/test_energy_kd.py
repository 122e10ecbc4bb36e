"""The shipped configs of Energy KD, end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import SMOKE, SMOKE_ARMS, published, run

from experiments import arms, cli, energy_kd
from experiments.distillation_setup import Setup, bank_view
from jkd import data, nn
from jkd import train as jkd_train


def largest_difference(first, second):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), first, second)))


def test_smoke_runs_its_arms_for_two_steps(smoke):
    workdir = smoke
    results = json.loads((workdir / "results.json").read_text())
    assert list(results) == ["method", "config", "stages", "results", "versions"]
    assert results["method"] == "energy_kd"
    assert results["config"]["data"]["name"] == "digits8x8"
    assert {"python", "jax", "flax", "optax"} <= set(results["versions"])
    assert list(results["stages"]) == ["teacher", *SMOKE_ARMS]
    assert all(stage["steps"] == 2 for stage in results["stages"].values())
    assert set(results["results"]["test/top1"]) == {"teacher", *SMOKE_ARMS}
    row = results["results"]["test/top1"]["energy_kd"]
    assert row["seeds"] == 2
    assert row["difference"]["to"] == "kd"
    assert (workdir / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_smoke_measures_the_teacher_and_the_groups(smoke):
    stages = json.loads((smoke / "results.json").read_text())["stages"]
    assert set(stages["teacher"]["metrics"]) == {
        "validation/top1",
        "test/top1",
        "energy/rank_correlation_confidence",
        "energy/accuracy_low_energy",
        "energy/accuracy_high_energy",
    }
    for name in SMOKE_ARMS:
        metrics = stages[name]["metrics"]
        assert ("groups/share_low" in metrics) == name.startswith(("energy", "kd_he_da"))
        assert all(np.shape(values) == (2,) for values in metrics.values())
    # Of the 40 rows a training sweep sees 32 (two full batches) and asks for int(0.3 * 32) = 9 of them below; the
    # other 8 rows may lie anywhere.
    for side in ("low", "high"):
        shares = np.array(stages["energy_kd"]["metrics"][f"groups/share_{side}"])
        assert np.all((shares >= 9 / 40) & (shares <= 17 / 40))
    shares = np.array(stages["kd_he_da"]["metrics"]["groups/share_high"])
    assert np.all((shares >= 16 / 40) & (shares <= 24 / 40))


def test_arms_differ_by_their_settings_and_seeds_by_their_numbers(smoke):
    workdir = smoke
    assert largest_difference(published(workdir, "energy_kd"), published(workdir, "kd")) > 0
    teacher = published(workdir, "teacher")
    assert largest_difference(*(jax.tree.map(lambda x, k=k: x[k], teacher) for k in (0, 1))) > 0


def test_a_finished_teacher_gives_the_same_students(smoke, tmp_path):
    workdir = run(tmp_path / "run", "only=kd,energy_kd", f"teacher.workdir={smoke}")
    for name in ("teacher", "kd", "energy_kd"):
        assert largest_difference(published(workdir, name), published(smoke, name)) <= 1e-6


def test_cached_logits_of_plain_images_are_the_live_teacher(smoke, tmp_path):
    cached = ("only=kd", "teacher.source=cached", "teacher.bank=1", f"teacher.workdir={smoke}")
    workdir = run(tmp_path / "run", *cached)
    assert largest_difference(published(workdir, "kd"), published(smoke, "kd")) < 1e-5


def test_cached_logits_are_those_of_the_bank_of_views(smoke, tmp_path):
    changes = ("only=kd", "seeds=1", "teacher.source=cached", "teacher.bank=3", "data.weak.flip=True")
    workdir = run(tmp_path / "run", *changes)
    consts = jax.tree.map(lambda x: x[0], jkd_train.load_outcome(workdir, "kd").consts)
    config = cli.load_run(str(workdir), {})
    setup = Setup.of(config)
    rows = np.asarray(consts["rows"]["train"])[:5]
    images = setup.task.pool.read(rows)["image"]
    teacher = jax.tree.map(lambda x: x[0], published(workdir, "teacher"))
    logits = np.asarray(consts["logits"]["teacher"])
    for view in range(3):
        views = setup.views["weak"]
        flipped = bank_view(views, consts["bank_key"], view, jnp.asarray(rows), jnp.asarray(images))
        expected = setup.teach("teacher", teacher, flipped)
        np.testing.assert_allclose(logits[view, np.asarray(consts["slot"])[rows]], expected, atol=1e-5)
    assert np.abs(np.diff(logits, axis=0)).max() > 1e-3
    # A teacher of one seed serves every seed of another run.
    workdir = run(tmp_path / "students", "only=ce", f"teacher.workdir={workdir}")
    assert jkd_train.load_outcome(workdir, "teacher").members == 0
    assert jkd_train.load_outcome(workdir, "ce").members == 2
    assert largest_difference(published(workdir, "ce"), published(smoke, "ce")) <= 1e-6


def test_students_with_batch_norm_train_one_after_another(smoke, tmp_path):
    model = ("ensemble=loop", "student.model=cnn", "student.width=4")
    workdir = run(
        tmp_path / "run", "only=energy_kd", "arms.energy_kd.mix=high_energy", *model, f"teacher.workdir={smoke}"
    )
    outcome = jkd_train.load_outcome(workdir, "energy_kd")
    assert outcome.members == 2
    statistics = jax.tree.leaves_with_path(outcome.published["batch_stats"])
    means = [np.asarray(x) for path, x in statistics if "mean" in str(path)]
    assert means
    assert all(mean.shape[0] == 2 and np.abs(mean[0] - mean[1]).max() > 0 for mean in means)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [record["train"] for record in lines if "train" in record]
    assert len(logged) == 2
    for window in logged:
        low, high, mean = (np.array(window[name]) for name in ("share_low", "share_high", "temperature"))
        np.testing.assert_allclose(mean, 6 * low + 2 * high + 4 * (1 - low - high), rtol=1e-5)


@pytest.fixture(scope="module")
def built():
    """The stages of every variant but smoke, built for stand-ins of the data."""
    variants = ("default", "hard", "cifar100", "cifar100_lt", "imagenet")
    configs = {v: cli.load_config(f"configs/energy_kd.py:{v}", {"data.blank": True}) for v in variants}
    return {v: (config, {s.name: s for s in energy_kd.stages(config)}) for v, config in configs.items()}


@pytest.mark.parametrize(
    ("variant", "model", "classes", "seeds", "looped", "steps"),
    [
        ("default", nn.mlp(10, hidden=(24, 24)), 10, 8, False, {"teacher": 625, "kd": 625, "kd_long": 938}),
        ("hard", nn.build("cnn", 30, width=6), 30, 5, True, {}),
        ("cifar100", nn.build("resnet20", 100), 100, 1, True, {"energy_kd": 187500, "energy_kd_long": 281250}),
        ("cifar100_lt", nn.build("resnet20", 100), 100, 1, True, {}),
        ("imagenet", nn.build("resnet18", 1000), 1000, 1, True, {"teacher": 250228}),
    ],
)
def test_every_variant_builds_its_stages(built, variant, model, classes, seeds, looped, steps):
    config, stages = built[variant]
    arms.check(config)
    more = ["dkd_long", "energy_dkd_long", "energy_kd_reversed_long"] if variant.startswith("cifar") else []
    assert list(stages) == [
        "teacher",
        *sorted([*SMOKE_ARMS, "dkd", "energy_kd_long", "energy_kd_reversed", "kd_cutmix", "kd_long", *more]),
    ]
    assert {(stage.members, stage.looped) for stage in stages.values()} == {(seeds, looped)}
    assert {name: stages[name].num_steps for name in steps} == steps
    setup = Setup.of(config)
    assert setup.network == model
    assert setup.task.num_classes == classes
    assert set(setup.task.sizes) == ({"train", "test"} | ({"validation"} if config.data.validation_examples else set()))


def test_long_tails_are_in_the_training_rows(built):
    config, _ = built["cifar100_lt"]
    task = Setup.of(config).task
    rows = task.split(jax.random.key(0))["train"]
    counts = np.bincount(task.pool.labels[rows], minlength=100)
    assert (counts.max(), counts.min()) == (500, 5)
    assert task.sizes["train"] == 10847  # as in the literature on CIFAR-100-LT at imbalance 100


def test_splits_are_disjoint_and_balanced():
    task = Setup.of(cli.load_config(SMOKE)).task
    rows = task.split(jax.random.key(3))
    assert {name: len(index) for name, index in rows.items()} == {"train": 40, "validation": 48, "test": 500}
    assert len(np.unique(np.concatenate([rows["train"], rows["validation"]]))) == 88
    assert not task.pool.overlaps(task.test)
    assert data.load("digits8x8", "train").labels[rows["train"]].tolist().count(3) in (4, 5)
    again = task.split(jax.random.key(3))
    other = task.split(jax.random.key(4))
    assert all((rows[name] == again[name]).all() for name in rows)
    assert (rows["train"] != other["train"]).any()
