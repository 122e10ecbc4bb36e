"""Generators: the shipped smoke runs, what their studies ask for, every variant's arms, and how they refuse."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers_experiments import QUIET, published
from PIL import Image

from experiments import cli, dual_contrastive_gan, fewshot_dcl, gan_fingerprinting, gan_measures, gan_networks, gans
from experiments import train as command
from experiments.report import Measure
from experiments.studies import run_study
from jkd import gan, nn, train
from jkd.errors import UserError
from jkd.interop.safetensors import save_safetensors
from jkd.train.lower import abstract_stages

METHODS = {
    "dual_contrastive_gan": dual_contrastive_gan,
    "gan_fingerprinting": gan_fingerprinting,
    "fewshot_dcl": fewshot_dcl,
}
VARIANTS = [
    (method, variant) for method in METHODS for variant in cli._load_module(cli.ROOT / f"configs/{method}.py").VARIANTS
]


pytestmark = pytest.mark.usefixtures("one_device")


def smoke_run(workdir, method, *arms, changes=()):
    """The workdir of a method's shipped smoke config, by the command's own main."""
    argv = ["--config", f"configs/{method}.py:smoke", "--workdir", str(workdir), f"--config.only={','.join(arms)},"]
    command.main([*argv, *QUIET, *(f"--config.{change}" for change in changes)])
    return workdir


@pytest.fixture(scope="module")
def losses(one_device, tmp_path_factory):
    return smoke_run(tmp_path_factory.mktemp("gan") / "run", "dual_contrastive_gan", "logistic", "dual")


@pytest.fixture(scope="module")
def fingerprints(one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("gan") / "run"
    # The perturbation that a claim is about.
    return smoke_run(workdir, "gan_fingerprinting", "full", "finetuned", changes=("perturbations=noise:0.1,",))


@pytest.fixture(scope="module")
def adapted(one_device, tmp_path_factory):
    return smoke_run(tmp_path_factory.mktemp("gan") / "run", "fewshot_dcl", "finetune", "dcl", "ewc")


RUNS = {"dual_contrastive_gan": "losses", "gan_fingerprinting": "fingerprints", "fewshot_dcl": "adapted"}


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def curve(workdir, stage, name):
    return results_of(workdir)["stages"][stage]["history"][name]


# --- smoke runs ---


@pytest.mark.parametrize("method", METHODS)
def test_finished_runs_hold_what_methods_compare(method, request):
    workdir = request.getfixturevalue(RUNS[method])
    results, measure = results_of(workdir), Measure.of(METHODS[method])
    arms = [name for name in results["stages"] if name != gans.FEATURES]
    assert measure.lower
    assert set(results["results"][measure.metric]) == set(arms)
    for name in arms:
        found = results["stages"][name]["metrics"]
        assert {measure.metric, measure.tune, "gallery/diversity", "manifold/precision", "manifold/kid"} <= set(found)
        assert all(np.isfinite(value).all() and len(value) == 2 for value in found.values()), found
        pictures = sorted(path.name for path in (workdir / "pictures").rglob(f"*{name}/gallery-generated-*.png"))
        steps = {2, 4} if results["stages"][name]["steps"] == 4 else {1}
        assert pictures == [f"gallery-generated-seed{k}-{t:08d}.png" for k in (0, 1) for t in sorted(steps)]


def test_pictures_show_the_judged_images(losses):
    config = cli.load_run(str(losses), {})
    setup = gans.Setup.of(config)
    players = setup.players(config.arms.dual)
    one = jax.tree.map(lambda x: x[1], published(losses, "dual"))
    judged = setup.part("test", 16)({"rows": setup.rows}).in_order().batch(0)["index"][:16]
    images = jax.jit(gan_measures.averaged(players))(one, {}, judged)
    (folder,) = (losses / "pictures").glob("*dual")
    shown = np.asarray(Image.open(folder / "gallery-generated-seed1-00000004.png"))
    wanted = gan_measures.tile(np.asarray(gan.as_uint8(images)))
    assert shown.shape == wanted.shape == (4 * 34, 4 * 34)
    np.testing.assert_allclose(shown.astype(int), wanted.astype(int), atol=1)


def test_arms_begin_alike_and_differ(losses):
    first, second = (published(losses, name) for name in ("logistic", "dual"))
    assert jax.tree.map(np.shape, first) == jax.tree.map(np.shape, second)
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, second)
    assert 0 < max(jax.tree.leaves(differences)) < 0.1, "four steps of 0.001 from the same parameters"
    lines = [json.loads(line) for line in (losses / "metrics.jsonl").read_text().splitlines()]
    (start, other) = (next(x["train"] for x in lines if x["stage"] == n and "train" in x) for n in ("logistic", "dual"))
    assert start["d_penalty"] == pytest.approx(other["d_penalty"], rel=1e-4)
    assert start["d_loss"] != other["d_loss"]


def test_an_instance_keeps_its_fingerprint_for_a_while(fingerprints):
    results = results_of(fingerprints)["stages"]
    full, instance = (results[name]["metrics"] for name in ("full", "finetuned"))
    assert set(published(fingerprints, "finetuned")["generator"]["params"]) == {"synthesis"}
    assert "style" not in published(fingerprints, "finetuned")["generator"]["params"]["synthesis"]["hidden1"]
    read = ("accuracy", "uint8", "real", "attributed", "detected", "false_alarms", "quantized:8", "pruned:0.5")
    for name in read:
        assert all(0 <= share <= 1 for share in full[f"bits/{name}"])
    np.testing.assert_allclose(full["bits/uint8"], full["bits/accuracy"], atol=0.1)
    np.testing.assert_allclose(full["bits/quantized:8"], full["bits/accuracy"], atol=0.1)
    assert all(0 <= share <= 1 for share in instance["bits/uint8"])
    assert (np.asarray(full["bits/change"]) > 0).all()


def test_adaptation_begins_at_the_source(adapted):
    source, shots = published(adapted, "source"), train.load_outcome(adapted, "dcl").consts["shots"]
    assert shots.shape == (2, 4, 8, 8, 1)
    # Inverted digits: what was dark is bright.
    assert np.median(shots) > 0.5
    for arm in ("finetune", "dcl", "ewc"):
        found = published(adapted, arm)
        assert set(found["discriminator"]["params"]) == {"whole"}
        pairs = (found["generator"]["params"], source["average"]["params"])
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *pairs)
        assert 0 < max(jax.tree.leaves(moved)) < 0.01, arm
    consts = train.load_outcome(adapted, "ewc").consts
    assert min(x.min() for x in jax.tree.leaves(consts["fisher"])) >= 0
    assert "fisher" not in train.load_outcome(adapted, "dcl").consts
    steps = curve(adapted, "dcl", "variety/pixels")["steps"]
    assert steps == [2, 4]


def test_features_and_source_are_taken_from_another_run(adapted, tmp_path):
    again = smoke_run(tmp_path / "run", "fewshot_dcl", "finetune", changes=(f"start.workdir={adapted}",))
    for name in (gans.FEATURES, fewshot_dcl.SOURCE, "finetune"):
        jax.tree.map(np.testing.assert_array_equal, published(again, name), published(adapted, name))
    stages = results_of(again)["stages"]
    assert stages["finetune"]["metrics"] == results_of(adapted)["stages"]["finetune"]["metrics"]
    assert (stages["source"]["steps"], stages["features"]["steps"]) == (0, 0)


def test_images_are_judged_by_a_file_of_weights(tmp_path):
    network = nn.build("cnn", 7, width=4)
    weights = nn.init(network, jax.random.key(5), (12, 12, 3))
    save_safetensors(tmp_path / "cnn.safetensors", weights)
    given = {
        "model": "cnn",
        "width": 4,
        "num_classes": 7,
        "rgb": True,
        "resize": 12,
        "init_from": tmp_path / "cnn.safetensors",
    }
    changes = [f"features.{name}={value}" for name, value in given.items()]
    workdir = smoke_run(tmp_path / "run", "dual_contrastive_gan", "logistic", changes=changes)
    jax.tree.map(np.testing.assert_array_equal, published(workdir, gans.FEATURES), weights)
    stages = results_of(workdir)["stages"]
    assert stages["features"]["steps"] == 0
    assert np.isfinite(stages["logistic"]["metrics"]["test/frechet"]).all()


SEEN = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    ("given", "seen", "width"),
    [
        ({"model": "mobilenet_v2", "num_classes": 1000, "rgb": True, "resize": 64, **SEEN}, (64, 64, 3), 1280),
        ({"model": "inception_v3", "num_classes": 1008, "rgb": True, "fid": True}, (299, 299, 3), 2048),
    ],
)
def test_networks_of_imagenet_see_grey_digits(given, seen, width):
    changes = {f"features.{name}": value for name, value in given.items()}
    setup = gans.Setup.of(cli.load_config("configs/dual_contrastive_gan.py:smoke", changes))
    assert setup.feature_shape == seen
    weights = jax.eval_shape(functools.partial(nn.init, setup.feature_model, image_shape=seen), jax.random.key(0))
    found = jax.eval_shape(setup.features, weights, jax.ShapeDtypeStruct((3, 8, 8, 1), np.uint8))
    assert found.shape == (3, width)
    shown = dataclasses.replace(setup, feature_model=SimpleNamespace(apply=lambda variables, images, train: images))
    black, white = shown.feature_outputs({}, np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    mean, std = (np.array(given.get(name, 0.5)) for name in SEEN)
    np.testing.assert_allclose(black, np.broadcast_to(-mean / std, seen), rtol=1e-5)
    np.testing.assert_allclose(white, np.broadcast_to((1 - mean) / std, seen), rtol=1e-5)


def test_sources_and_features_that_do_not_fit_are_refused(adapted, tmp_path, refused):
    argv = ("--config", "configs/fewshot_dcl.py:smoke", "--workdir", tmp_path / "run", "--config.only=finetune,")
    given = f"--config.start.workdir={adapted}"
    for change, says in (
        ("generator.hidden=(16,8)", "holds other networks than this config's: set generator.* and discriminator.*"),
        ("features.hidden=(8,)", "is not one 'mlp' as features.* describes it"),
        ("seeds=3", "has 2 seeds and the config seeds=3"),
    ):
        assert says in refused(command.main, *argv, given, f"--config.{change}")
    stored = f"--config.features.init_from={adapted}:finetune"
    assert "is not one 'mlp'" in refused(command.main, *argv, stored)
    assert "features.init_from" in refused(command.main, *argv, "--config.features.rgb=true")


# --- studies ---


class Made(dict):
    """Two seeds of any metric of a smoke run."""

    def __init__(self, known):
        self.known = known

    def __missing__(self, metric):
        assert metric in self.known, f"no evaluator finds {metric}"
        return np.random.default_rng(len(metric)).uniform(0.1, 0.9, 2).tolist()


@functools.cache
def evaluators_of(method, arm):
    """The evaluators that an arm's stage has."""
    config = cli.load_config(f"configs/{method}.py:smoke", {"only": (arm,)})
    return {stage.name: set(stage.evaluators) for stage in METHODS[method].stages(config)}[arm]


def curves_of(config, names):
    """The history of an arm that is measured as often as the config says."""
    if "adapt" not in config:
        return {}
    steps = list(range(config.adapt.every, config.adapt.steps + 1, config.adapt.every))
    return {name: {"steps": steps, "values": [[0.5, 0.7]] * len(steps)} for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_studies_ask_for_what_runs_find(method, request):
    """Every claim's stage and metric: of the smoke run, of an arm with the same evaluators, or derived from them."""
    module, stages = METHODS[method], results_of(request.getfixturevalue(RUNS[method]))["stages"]
    known = {}
    for found in stages.values():
        for name in found["metrics"]:
            known.setdefault(name.split("/")[0], set()).add(name)
    studies = getattr(module, "STUDIES", ())
    for study in studies:
        config = cli.load_config(study.config, {})
        arms = list(study.arms or config.arms)
        names = [*study.shared, *arms]
        if study.name == "digits":  # its metrics are those of the smoke run
            of = {arm: set().union(*(known.get(name, ()) for name in evaluators_of(method, arm))) for arm in arms}
            of |= {arm: set(stages[arm]["metrics"]) for arm in arms if arm in stages}
        else:
            of = dict.fromkeys(names, set().union(*known.values()))
        made = {
            name: {"metrics": Made(of.get(name, set())), "history": curves_of(config, of.get(name, ()))}
            for name in names
        }
        found = run_study(
            study,
            lambda cells, made=made: {c: {"workdir": "w", "stages": made} for c in cells},
            list(study.shared),
            arms,
            Measure.of(module),
        )
        assert [claim["claim"] for claim in found["claims"]] == [claim.text for claim in study.claims]
        assert set(found["rates"]) == (set(arms) if study.rates else set())


# --- every variant ---


@pytest.mark.parametrize(("method", "variant"), VARIANTS)
def test_every_variant_is_one_that_could_be_trained(method, variant):
    config = cli.load_config(f"configs/{method}.py:{variant}", {"data.blank": True})
    METHODS[method].check(config)
    assert METHODS[method].BASELINE in config.arms


@pytest.mark.parametrize(
    ("method", "variant", "only"),
    [
        *((method, "smoke", ()) for method in METHODS),
        ("dual_contrastive_gan", "fashion", ("dual",)),
        ("dual_contrastive_gan", "celeba128", ("dual_attention",)),
        ("gan_fingerprinting", "celeba128", ("full",)),
        ("fewshot_dcl", "babies", ("dcl",)),
    ],
)
def test_arms_are_laid_out(method, variant, only):
    """Traced, with lazy penalties, on stand-ins for the data: of each kind of networks one."""
    module, mesh = METHODS[method], train.make_mesh(devices=jax.devices()[:1])
    config = cli.load_config(f"configs/{method}.py:{variant}", {"data.blank": True, "only": only})
    found = {one.stage.name: one.plan.carry.report for one in abstract_stages(module.stages(config), mesh)}
    for name in only or config.arms:
        assert {"d_loss", "g_loss"} <= set(found[name].sums)


# --- mistakes ---


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("dual_contrastive_gan", "arms.dual.loss=dul", "Did you mean 'dual'"),
        ("dual_contrastive_gan", "arms.dual.penalty=r2", "arms.dual.penalty"),
        ("dual_contrastive_gan", "only=dul,", "Did you mean 'dual'"),
        ("dual_contrastive_gan", "only=source,", "Unknown arm in config.only 'source'"),
        ("dual_contrastive_gan", "generator.model=stylegan", "Did you mean 'stylegan2'"),
        ("dual_contrastive_gan", "game.penalty=r3", "game.penalty"),
        ("dual_contrastive_gan", "game.penalty_every=0", "game.penalty_every"),
        ("dual_contrastive_gan", "game.beta2=1.0", "game.beta2 must lie in [0, 1), got 1.0"),
        ("dual_contrastive_gan", "judge.per_image=0", "judge.per_image"),
        ("dual_contrastive_gan", "features.init_from=runs", "features.init_from must be WORKDIR:STAGE"),
        ("dual_contrastive_gan", "features.rgb=true", "set features.init_from"),
        ("dual_contrastive_gan", "arms.dual.discriminator_attention=patchwise,", "got 'patchwise'"),
        ("gan_fingerprinting", "perturbations=nois:0.1,", "Did you mean 'noise'"),
        ("gan_fingerprinting", "perturbations=noise:much,", 'holds perturbations as "NAME:STRENGTH"'),
        ("gan_fingerprinting", "arms.immunized.immunize=blr:1,", "Did you mean 'blur'"),
        ("gan_fingerprinting", "arms.full.weights=(1.0,1.0)", "arms.full needs bits >= 1 and four weights"),
        ("gan_fingerprinting", "arms.finetuned.start=plain", "arms.finetuned.start"),
        ("gan_fingerprinting", "false_positive_rate=0.0", "false_positive_rate must lie in (0, 1]"),
        ("fewshot_dcl", "adapt.batch_size=1 only=dcl,", "a contrast needs another image in the batch"),
        ("fewshot_dcl", "adapt.batch_size=2", "at least 3 for cdc"),
        ("fewshot_dcl", "target.transform=invrt", "Did you mean 'invert'"),
        ("fewshot_dcl", "target.shots=0", "target.shots must be at least 1"),
        ("fewshot_dcl", "arms.dcl.cl1=-1.0", "arms.dcl.cl1"),
        ("fewshot_dcl", "only=sorce,", "Did you mean 'source'"),
    ],
)
def test_mistakes(method, change, says, refused):
    line = refused(
        command.main, "--config", f"configs/{method}.py:smoke", "--dry-run", *(f"--config.{c}" for c in change.split())
    )
    assert says in line


def test_only_square_images_of_the_right_size_for_stylegan2():
    assert gan_networks.resolution_of((32, 32, 3)) == 32
    for shape in ((28, 28, 1), (4, 4, 3), (16, 8, 1)):
        with pytest.raises(UserError, match="set data.resize, or another model"):
            gan_networks.resolution_of(shape)
