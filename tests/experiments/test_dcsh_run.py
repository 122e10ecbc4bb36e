"""Spectral hashing: the shipped smoke run, what its studies ask for, every variant's arms, and how they refuse."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers_experiments import QUIET, published

from experiments import cli, dcsh, dcsh_codes, html, markdown, search
from experiments import train as command
from experiments.report import Measure
from experiments.studies import run_study
from jkd import metrics, train
from jkd.errors import UserError
from jkd.train.log import jsonable
from jkd.train.lower import abstract_stages

CONFIG = "configs/dcsh.py"
VARIANTS = cli._load_module(cli.ROOT / CONFIG).VARIANTS
ARMS = ("joint", "lsh", "cca")


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def smoke(one_device, tmp_path_factory):
    """The shipped smoke run, one arm of each kind."""
    workdir = tmp_path_factory.mktemp("dcsh") / "run"
    argv = ["--config", f"{CONFIG}:smoke", "--workdir", str(workdir), f"--config.only={','.join(ARMS)}", *QUIET]
    command.main(argv)
    return workdir


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_a_finished_run_compares_its_arms(smoke):
    results = results_of(smoke)
    assert set(results["results"][dcsh.MEASURE.metric]) == set(ARMS)
    for name in ("joint_codes", "lsh_codes"):
        found = results["stages"][name]["metrics"]
        assert set(found) == {"train/map", "train/bit_correlation"}
        assert all(0 <= value <= 100 for values in found.values() for value in values)
    for name in ARMS:
        found = results["stages"][name]["metrics"]
        assert {dcsh.MEASURE.metric, dcsh.MEASURE.tune} <= set(found)
        assert all(np.isfinite(values).all() and len(values) == 2 for values in found.values()), found


def test_networks_read_the_codes_of_their_pairs(smoke):
    codes = published(smoke, "joint_codes")["codes"]
    assert codes.dtype == np.int8
    assert codes.shape == (2, 96, 8)
    assert set(np.unique(codes)) == {-1, 1}
    consts = train.load_outcome(smoke, "joint").consts
    for k in range(2):
        rows = consts["rows"]["train"][k]
        np.testing.assert_array_equal(consts["codes"][k][rows], codes[k])
        others = np.setdiff1d(np.arange(consts["codes"].shape[1]), rows)
        assert not consts["codes"][k][others].any(), "nothing but training pairs has a code of step 1"
    queries = [set(map(int, consts["rows"]["query"][k])) & set(map(int, consts["rows"]["train"][k])) for k in range(2)]
    assert queries == [set(), set()]


def test_seeds_and_arms_differ_as_they_should(smoke):
    joint, lsh = (published(smoke, f"{name}_codes")["codes"] for name in ("joint", "lsh"))
    assert (joint[0] != joint[1]).any()
    assert (joint != lsh).any()
    rows = [train.load_outcome(smoke, f"{name}_codes").consts["rows"]["train"] for name in ("joint", "lsh")]
    np.testing.assert_array_equal(*rows)
    lines = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    first = next(line["train"] for line in lines if line["stage"] == "joint" and "train" in line)
    assert {"first", "second", "first_bits", "second_bits"} <= set(first)
    rounds = next(line["train"] for line in lines if line["stage"] == "joint_codes" and "train" in line)
    assert set(rounds) == {"objective", "changed"}


def test_codes_of_held_out_pairs_are_searched(smoke):
    config = cli.load_run(str(smoke), {})
    hits = search.search(config, str(smoke), "data:2", 5, "joint", 1)
    outcome, setup = train.load_outcome(smoke, "joint"), dcsh.Setup.of(config)
    variables, consts = (jax.tree.map(lambda x: x[1], of) for of in (outcome.published, outcome.consts))
    rows = consts["rows"]
    batches = [setup.task.pool.read(np.asarray(index)) for index in (rows["query"][2:3], rows["database"])]
    asked, searched = (setup.networks.logits(variables, consts, batch) for batch in batches)
    distances = np.asarray(metrics.hamming_distance(asked["first"] >= 0, searched["second"] >= 0))[0]
    order = np.argsort(distances, kind="stable")[:5]
    np.testing.assert_array_equal(hits.rows, order)
    np.testing.assert_array_equal(hits.distances, distances[order])
    with pytest.raises(UserError, match="Unknown arm 'joint_codes'"):
        search.search(config, str(smoke), "data:2", 5, "joint_codes")


def smoke_config(**changes):
    return cli.load_config(f"{CONFIG}:smoke", changes)


def test_rounds_without_weights_raise_the_objective(tmp_path):
    """The stage makes what `fit_binary_codes` makes: its objective never falls."""
    config = smoke_config(**{"arms.unweighted.iters": 4, "log_every": 1})
    stages = dcsh_codes.CodeStages(config, dcsh.load_pairs(config))
    mesh = train.make_mesh(devices=jax.devices()[:1])
    stage = stages.stage("unweighted", config.arms.unweighted)
    found = train.run([stage], workdir=tmp_path / "run", log_every=1, mesh=mesh)
    assert found["unweighted_codes"]["steps"] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    objective = np.array([line["train"]["objective"] for line in lines if "train" in line])
    assert objective.shape == (4, 2)
    assert (np.diff(objective, axis=0) >= -1e-3).all()


# --- studies ---


def made_up(known):
    """Two seeds of every metric that a smoke run finds."""
    return {metric: np.random.default_rng(len(metric)).uniform(10, 90, 2).tolist() for metric in known}


def test_studies_ask_for_what_runs_find(smoke):
    stages = results_of(smoke)["stages"]
    codes, learned = (set(stages[name]["metrics"]) for name in ("joint_codes", "joint"))
    for study in dcsh.STUDIES:
        config = cli.load_config(study.config, {})
        arms = list(study.arms or config.arms)
        learn = [] if study.name == "clusters" else arms
        names = [*learn, *(f"{arm}_codes" for arm in arms)]
        made = {
            name: {"metrics": made_up(codes if name.endswith("_codes") else learned), "history": {}} for name in names
        }
        found = run_study(
            study,
            lambda cells, made=made: {c: {"workdir": "w", "stages": made} for c in cells},
            (),
            arms,
            study.measure or Measure.of(dcsh),
        )
        assert [claim["claim"] for claim in found["claims"]] == [claim.text for claim in study.claims]
        results = {"dcsh": {study.name: jsonable({**found, "baseline": dcsh.BASELINE})}}
        assert f"{(learn or names)[0]}</td>" in html.page(results)
        assert f"`{(learn or names)[0]}`" in markdown.page(results)


# --- every variant ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_that_could_be_trained(variant):
    config = cli.load_config(f"{CONFIG}:{variant}", {"data.blank": True})
    dcsh.check(config)
    assert dcsh.BASELINE in config.arms


@functools.cache
def laid_out(variant, *only, **changes):
    mesh = train.make_mesh()
    config = cli.load_config(f"{CONFIG}:{variant}", {"data.blank": True, "only": only, **changes})
    return {one.stage.name: one.plan for one in abstract_stages(dcsh.stages(config), mesh)}


def test_rows_of_large_sets_are_split_over_devices():
    """NUS-WIDE at the paper's size: what has a row for each pair lies on its device, and graphs are their entries."""
    plan = laid_out("nuswide", "joint")["joint_codes"]
    state, consts = plan.carry.state, plan.consts
    assert state["by_row"]["codes"].shape == (1, 10496, 64)
    assert [sorted(one) for one in consts["by_row"]["factors"]] == [["indices", "values"]] * 2
    for leaf in jax.tree.leaves(plan.shardings.state["by_row"]):
        assert leaf.spec[1] == ("slice", "data", "fsdp")
    largest = max(np.prod(x.shape) for x in jax.tree.leaves((state, consts)))
    assert largest < 10496 * 500, "neither [rows, rows] nor [rows, anchors]"


def test_texts_are_read_by_convolutions():
    changes = {"data.masked": True, "data.second_shape": (6, 5)}
    plan = laid_out("smoke", "joint", **changes)["joint"]
    params = plan.carry.state.params["second"]
    assert {"conv1", "conv5", "head"} <= set(params)
    assert {"first", "second", "loss"} <= set(plan.carry.report.sums)


def test_images_have_a_backbone():
    plan = laid_out("smoke", "joint", **{"data.first_shape": (8, 8, 1), "network.agreement": 0.1})["joint"]
    assert "backbone" in plan.carry.state.params["first"]
    assert set(plan.carry.state.model_state) == {"batch_stats"}
    assert "agreement" in plan.carry.report.sums


# --- mistakes ---


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("arms.joint.codes=both", "Unknown arms.joint.codes 'both'"),
        ("only=jont,", "Did you mean 'joint'"),
        ("bits=24", "graph.anchors=24 must be more than bits=24"),
        ("graph.nearest=25", "graph.nearest=25 must be at most graph.anchors=24"),
        ("graph.anchors=97", "graph.anchors=97 is more than the 96 training pairs"),
        ("graph.normalize=l1", "graph.normalize"),
        ("network.loss=hinge", "network.loss"),
        ("arms.joint.alpha=-1.0", "arms.joint.alpha must be finite and >= 0"),
        ("codes.redraw=true", "codes.redraw makes data anew"),
    ],
)
def test_bad_configs_are_refused(change, says, refused, tmp_path):
    argv = ("--config", f"{CONFIG}:smoke", "--workdir", tmp_path / "run")
    assert says in refused(command.main, *argv, f"--config.{change}")


def test_texts_without_words_and_broken_features_are_refused():
    config = smoke_config()
    task = dcsh.load_pairs(config)
    consts = task.draw(jax.random.key(0))
    batch = task.pool.rows.read(consts["rows"]["train"])
    features = functools.partial(dcsh_codes.side_features, task, consts, side="first", normalize="l2")
    np.testing.assert_allclose(np.linalg.norm(features(batch=batch), axis=1), 1, rtol=1e-5)
    words = batch | {"first": batch["first"][:, None], "first_mask": np.arange(96)[:, None] != 5}
    with pytest.raises(ValueError, match="Text 5 of column 'first' has no word"):
        features(batch=words)
    with pytest.raises(ValueError, match="NaN or inf"):
        features(batch=batch | {"first": batch["first"] * np.nan})


def test_too_few_different_rows_are_refused():
    config = smoke_config()
    with pytest.raises(ValueError, match="needs at least 9 anchors with neighbours, and"):
        dcsh_codes.factor_of(jax.random.key(0), np.repeat(np.eye(2, 6, dtype=np.float32), 20, 0), config)
