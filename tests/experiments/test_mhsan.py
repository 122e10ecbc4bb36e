"""Images and captions: the shipped smoke run, what its studies ask for, every variant, users' files, and refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import QUIET, published
from PIL import Image

from experiments import captions, cli, embedding_measures, mhsan
from experiments import train as command
from experiments.studies import run_study
from jkd import train
from jkd.errors import UserError
from jkd.train.lower import abstract_stages

VARIANTS = cli._load_module(cli.ROOT / "configs/mhsan.py").VARIANTS
SMOKE = "configs/mhsan.py:smoke"


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
    """The workdir of the shipped smoke config, by the command's own main."""
    workdir = tmp_path_factory.mktemp("mhsan") / "run"
    command.main(["--config", SMOKE, "--workdir", str(workdir), "--config.only=heads4,mean", *QUIET])
    return workdir


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_finished_runs_hold_what_methods_compare(finished):
    results = results_of(finished)
    assert set(results["results"]["test/total"]) == {"heads4", "mean"}
    for name in ("heads4", "mean"):
        found = results["stages"][name]["metrics"]
        ways = [f"test/{way}_{of}" for way in ("i2t", "t2i") for of in ("r1", "r5", "r10", "median")]
        assert {"test/total", "validation/total", "test/folds_total", *ways} <= set(found)
        assert ("test/image_overlap" in found) == (name == "heads4")
        assert all(np.isfinite(value).all() and len(value) == 2 for value in found.values()), found
        six = [found[f"test/{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
        np.testing.assert_allclose(np.sum(six, 0), found["test/total"], rtol=1e-5)
        assert results["stages"][name]["history"]["test/total"]["steps"] == [2, 4]


def test_attention_is_drawn(finished):
    (folder,) = (finished / "pictures").glob("*heads4")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"gallery-{side}-attention-seed{k}-00000004.png" for side in ("image", "text") for k in (0, 1)]
    shown = np.asarray(Image.open(folder / names[0]))
    # Four images, each with the maps of four heads: 4 x 4 positions of 16 pixels.
    assert shown.shape == (4 * (64 + 2), 5 * (64 + 2))
    assert len(np.unique(shown)) > 10


def test_parts_begin_when_the_config_says(finished):
    first, lines = {}, [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["stage"] == "heads4" and "train" in line:
            first[line["step"]] = line["train"]
    assert all(np.isfinite(of["ranking"]).all() for of in first.values())
    config = cli.load_run(str(finished), {})
    setup = mhsan.Setup.of(config)
    stage = mhsan.arm_stage(setup, "heads4")
    assert setup.steps_per_epoch(16) == 4
    assert stage.num_steps == 4
    assert set(published(finished, "heads4")["params"]) == {"image", "text"}


# --- search ---


def test_captions_find_pictures_and_the_other_way(finished, tmp_path):
    searcher = mhsan.searcher(cli.load_run(str(finished), {}), "heads4")
    assert searcher.sides == {"image": "image", "text": "text"}
    consts = train.load_outcome(finished, "heads4").consts
    consts = jax.tree.map(lambda x: np.asarray(x)[0], consts)
    one = jax.tree.map(lambda x: x[0], published(finished, "heads4"))
    batch = searcher.source(consts, "query").batch(0)
    encode = {side: jax.jit(functools.partial(searcher.encode, side)) for side in ("image", "text")}
    vectors = {side: np.asarray(encode[side](one, consts, batch)) for side in encode}

    def asked(side, query):
        row = {name: np.repeat(column, 16, 0) for name, column in searcher.read(side, query).items()}
        return encode[side](one, consts, row)[0]

    assert (vectors["image"].shape, vectors["text"].shape) == ((16, 16), (16, 2, 16))
    shown, said = (searcher.show(side, consts, "query", 3, 1) for side in ("image", "text"))
    np.testing.assert_array_equal(shown.picture, batch["image"][3])
    assert said.picture is None
    # What is asked in words, or as a file, is what the set has.
    np.testing.assert_allclose(asked("text", said.text)[0], vectors["text"][3, 1], atol=1e-5)
    Image.fromarray(shown.picture[..., 0]).save(tmp_path / "asked.png")
    np.testing.assert_allclose(asked("image", str(tmp_path / "asked.png")), vectors["image"][3], atol=1e-5)


@pytest.mark.parametrize(
    ("side", "query", "says"),
    [
        ("text", "thre", "Did you mean 'three'"),
        ("text", "", "must be of 1 to"),
        ("text", "one " * 30, "got 30"),
        ("image", "none.png", "none.png cannot be read"),
    ],
)
def test_queries_that_nothing_can_be_made_of(side, query, says):
    config = cli.load_config(SMOKE, {})
    with pytest.raises(UserError, match=says):
        mhsan.searcher(config, "heads4").read(side, query)


# --- studies ---


class Made(dict):
    """Two seeds of any metric of a smoke run."""

    def __init__(self, known):
        self.known = known

    def __missing__(self, metric):
        assert metric in self.known, f"no evaluator finds {metric}"
        return np.random.default_rng(len(metric)).uniform(0.1, 0.9, 2).tolist()


@pytest.mark.parametrize("study", mhsan.STUDIES, ids=lambda study: study.name)
def test_studies_ask_for_what_runs_find(study, finished):
    stages = results_of(finished)["stages"]
    config = cli.load_config(study.config, {})
    arms = [name for name in config.arms if name in (study.arms or config.arms)]
    history = {
        name: {"steps": [1, 2], "values": [[0.5, 0.9], [0.7, 0.1]]} for name in ("validation/total", "test/total")
    }
    kinds = {arm: "mean" if config.arms[arm].heads == 1 else "heads4" for arm in arms}
    made = {arm: {"metrics": Made(stages[kind]["metrics"]), "history": history} for arm, kind in kinds.items()}
    found = run_study(
        study, lambda cells: {c: {"workdir": "w", "stages": made} for c in cells}, [], arms, mhsan.MEASURE
    )
    assert [claim["claim"] for claim in found["claims"]] == [claim.text for claim in study.claims]
    assert set(found["rates"]) == set(arms)
    assert found["stages"]["heads1_best"]["metrics"]["test/total"] == [0.7, 0.9]


# --- every variant ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_that_could_be_trained(variant):
    config = cli.load_config(f"configs/mhsan.py:{variant}", {"data.blank": True})
    mhsan.check(config)
    assert mhsan.BASELINE in config.arms


def test_one_wide_head_has_as_many_parameters_as_four():
    for variant in ("default", "scenes"):
        config = cli.load_config(f"configs/mhsan.py:{variant}", {"data.test_examples": 10})
        setup = mhsan.Setup.of(config)
        counts = []
        for name in ("wide1", "heads4"):
            shapes = jax.eval_shape(setup.model(config.arms[name]).init, jax.random.key(0), *setup.example())
            counts.append(sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])))
        assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize(("variant", "only"), [("smoke", ()), ("coco", ("heads10",)), ("single", ("mean",))])
def test_arms_are_laid_out(variant, only):
    """Traced, on stand-ins for the data."""
    config = cli.load_config(f"configs/mhsan.py:{variant}", {"data.blank": True, "only": only})
    mesh = train.make_mesh(devices=jax.devices()[:1])
    found = {one.stage.name: one.plan.carry.report for one in abstract_stages(mhsan.stages(config), mesh)}
    for name in only or config.arms:
        assert {"loss", "ranking", "image_diversity"} <= set(found[name].sums)


def test_users_bring_features_and_captions(tmp_path):
    draw = np.random.default_rng(0)
    given = {
        "image": draw.normal(size=(24, 2, 2, 3)).astype(np.float32),
        "words": draw.integers(1, 9, (24, 2, 4)),
        "split": np.array(["train"] * 16 + ["val"] * 4 + ["test"] * 4),
        "table": draw.normal(size=(9, 5)).astype(np.float32),
    }
    np.savez(tmp_path / "given.npz", **given)
    changes = {"data.name": "file", "data.file": str(tmp_path / "given.npz"), "network.backbone": ""}
    changes |= {"only": ("heads4",), "eval_batch_size": 4, "data.features_given": True}
    config = cli.load_config(SMOKE, changes)
    task = captions.load_task(config)
    consts = task.draw(jax.random.key(0))
    np.testing.assert_array_equal(consts["table"], given["table"])
    batch = task.part(consts, "test", 4).batch(0)
    np.testing.assert_array_equal(batch["index"], [20, 21, 22, 23])
    words = captions.Inputs.words(batch["words"], consts)
    np.testing.assert_array_equal(words, given["table"][given["words"][20:]])
    mesh = train.make_mesh(devices=jax.devices()[:1])
    (found,) = abstract_stages(mhsan.stages(config), mesh)
    assert found.plan.carry.state.params["image"]["positions"]["kernel"].shape[-2:] == (3, 12)


# --- what evaluators do ---


def test_recalls_of_few_images():
    vectors = np.eye(4, dtype=np.float32)
    rows = {"image": vectors, "text": np.repeat(vectors[:, None], 2, 1), "image_overlap": np.full(4, 0.25)}
    found = embedding_measures.measure(rows, folds=2)
    assert found["i2t_r1"] == found["t2i_r1"] == 100
    assert found["total"] == found["folds_total"] == 200, "there are only four images"
    assert found["image_overlap"] == 0.25
    assert "text_overlap" not in found


def test_pixels_become_cells_with_places():
    images = jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4, 1)
    inputs = captions.Inputs((0.0,), (1 / 255,), 2, True)
    maps = np.asarray(inputs.images(images))
    assert maps.shape == (1, 2, 2, 6)
    np.testing.assert_allclose(maps[0, 0, 1], [2, 3, 6, 7, -1, 1])
    np.testing.assert_allclose(maps[0, 1, 0], [8, 9, 12, 13, 1, -1])
    with pytest.raises(UserError, match=r"data.cells=3 does not divide images of 4 x 4"):
        captions.cut(images, 3)


# --- mistakes ---


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.name=scene", "Did you mean 'scenes'"),
        ("data.name=coco", "set data.file to an .npz"),
        ("data.name=file data.file=none.npz", "none.npz cannot be read"),
        ("only=heads3,", "Did you mean 'heads"),
        ("arms.heads4.pool=max", "arms.heads4.pool"),
        ("arms.heads4.negatives=hardest", "arms.heads4.negatives"),
        ("arms.heads4.negatives=16", "negatives in [1, batch - 1]; got 16 and 16"),
        ("arms.heads4.heads=0", "arms.heads4.heads"),
        ("network.cell=lstm", "network.cell"),
        ("network.dropout=1.0", "network.dropout must lie in [0, 1), got 1.0"),
        ("network.tap=block9", "block9"),
        ("train.schedule=step", "train.schedule"),
        ("train.factors=(0.1,)", "equally many"),
        ("data.objects=20 data.name=scenes", "objects <= grid * grid"),
        ("data.validation_examples=0", "data.validation_examples"),
    ],
)
def test_mistakes(change, says, refused):
    line = refused(command.main, "--config", SMOKE, "--dry-run", *(f"--config.{c}" for c in change.split()))
    assert says in line
