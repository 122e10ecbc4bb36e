"""CMIMH: what evaluators of codes measure, the shipped smoke run, every variant's stages, and how they refuse."""

import json

import jax
import numpy as np
import pytest
from helpers_experiments import QUIET, published

from experiments import cli, cmimh, evaluate, hashing
from experiments import train as command
from experiments.studies import run_study
from jkd import train
from jkd.errors import UserError
from jkd.train.lower import abstract_stages

VARIANTS = cli._load_module(cli.ROOT / "configs/cmimh.py").VARIANTS


pytestmark = pytest.mark.usefixtures("one_device")


def signs(*rows):
    return np.array(rows) > 0


QUERY = (1, 1, -1, -1)
DATABASE = ((1, 1, -1, -1), (1, 1, 1, 1), (-1, -1, 1, 1), (1, 1, -1, 1))  # 0, 2, 4 and 1 bits away


def rows(relevant, **changes):
    """One query of class 1; both sides have the same codes."""
    codes = signs(QUERY, *DATABASE)
    label = np.array([1, *relevant], np.int32)
    return {"first": codes, "second": codes, "label": label, "sound": np.ones(5, bool), **changes}


@pytest.mark.parametrize(("relevant", "expected"), [((1, 0, 0, 1), 1.0), ((0, 1, 0, 1), 0.583333)])
def test_average_precision_by_hand(relevant, expected):
    found = hashing.findings(rows(relevant), queries=1)
    for name in (*hashing.TASKS, "cross"):
        assert found[name] == pytest.approx(100 * expected, abs=1e-3)
    assert found["without"] == 0


def test_each_side_asks_and_is_searched():
    # The second side's code of the only relevant row is opposite: the last to be found from the first side.
    second = signs(QUERY, (-1, -1, 1, 1), *DATABASE[1:])
    found = hashing.findings(rows((1, 0, 0, 0), second=second), queries=1, top=2)
    assert found["first_to_first"] == pytest.approx(100)
    assert found["first_to_second"] == pytest.approx(100 / 3)  # of equally far ones the earlier row is nearer
    assert found["second_to_first"] == pytest.approx(100)
    assert found["second_to_second"] == pytest.approx(100 / 3)
    assert found["cross"] == pytest.approx((100 / 3 + 100) / 2)
    assert (found["first_to_second_top"], found["second_to_first_top"]) == (0, 100)


def test_queries_without_relevant_rows_are_counted_and_labels_may_be_several():
    several = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]], bool)
    codes = signs(QUERY, QUERY, *DATABASE[1:])
    found = hashing.findings(rows((0,) * 4, first=codes, second=codes, label=several), queries=2)
    assert found["without"] == 0
    several[0, 0] = False  # no label at all
    assert hashing.findings(rows((0,) * 4, first=codes, second=codes, label=several), queries=2)["without"] == 1


def test_codes_that_say_nothing_are_said_aloud():
    constant = np.tile(signs(QUERY), (5, 1))
    found = hashing.findings(rows((1, 0, 0, 1), first=constant, second=constant), queries=1)
    assert found["constant_bits"] == 100
    assert "100 % of the bits" in hashing._warn(found)
    assert hashing._warn({"constant_bits": 12.0}) is None
    with pytest.raises(UserError, match="codes of 1 rows are NaN"):
        hashing.findings(rows((1, 0, 0, 1), sound=np.arange(5) > 0), queries=1)


def test_probes_find_what_is_there():
    draw = np.random.RandomState(0)
    codes = draw.rand(400, 6) < 0.5
    answers = np.stack([codes[:, 0], ~codes[:, 3]], 1)
    assert cmimh.probe(codes, answers, 100) == 1
    assert abs(cmimh.probe(codes, draw.rand(400, 2) < 0.5, 100) - 0.5) < 0.12


# --- runs ---


def smoke(workdir, *changes):
    argv = ["--config", "configs/cmimh.py:smoke", "--workdir", str(workdir), *QUIET]
    command.main([*argv, *(f"--config.{change}" for change in changes)])
    return json.loads((workdir / "results.json").read_text())["stages"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cmimh") / "run"
    return workdir, smoke(workdir, "only=full,free,cca,random,")


def test_finished_runs_hold_what_methods_compare(finished):
    workdir, stages = finished
    for name in ("full", "free", "cca", "random"):
        for metric in ("test/cross", "validation/cross", "test/first_to_first_top", "test/constant_bits"):
            values = np.array(stages[name]["metrics"][metric])
            assert values.shape == (2,)
            assert ((values >= 0) & (values <= 100)).all()
    assert set(published(workdir, "free")["params"]) == {"first", "second", "critics"}
    assert set(published(workdir, "full")["params"]) == {"first", "second"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    terms = next(line for line in lines if "intra_first" in json.dumps(line))
    assert "cross_second" in json.dumps(terms)


def test_evaluation_repeats_what_was_stored(finished):
    workdir, _ = finished
    found = evaluate.evaluate(cli.load_run(str(workdir), {}), str(workdir), ["full", "random"])
    assert all(np.abs(of["difference"]).max() < 1e-6 for stage in found.values() for of in stage.values())


def test_relaxed_draws_and_several_train_too(tmp_path):
    changes = ("arms.full.estimator=relaxed", "arms.full.samples=2", "arms.full.gap_kind=kl", "max_pairs=200")
    stages = smoke(tmp_path / "run", "only=full,", "seeds=1", "ensemble=loop", *changes)
    assert np.isfinite(stages["full"]["metrics"]["test/cross"]).all()


def test_private_factors_are_probed(tmp_path):
    data = {"name": "factors", "examples": 300, "query_examples": 60, "validation_examples": 40}
    changes = [f"data.{name}={value}" for name, value in data.items()]
    stages = smoke(tmp_path / "run", "only=cross_only,", "seeds=1", "training.epochs=1.0", *changes)
    assert 20 <= np.mean(stages["cross_only"]["metrics"]["private/private"]) <= 100


# --- configs and studies ---


def test_every_variant_is_sound():
    for variant in VARIANTS:
        cmimh.check(cli.load_config(f"configs/cmimh.py:{variant}", {}))


@pytest.mark.parametrize("variant", ["fashion", "nuswide"])
def test_variants_of_other_shapes_can_be_planned(variant):
    config = cli.load_config(f"configs/cmimh.py:{variant}", {"data.blank": True, "seeds": 1})
    config.only = ("free", "cca")
    if variant == "fashion":
        config.encoders.first.kind = "image"
    stages = cmimh.stages(config)
    assert [stage.name for stage in stages] == ["free", "cca"]
    mesh = train.make_mesh(devices=jax.devices()[:1])
    (found,) = abstract_stages([stage for stage in stages if stage.has_steps][:1], mesh)
    params = found.plan.carry.state.params
    bits = {leaf.shape[-1] for leaf in jax.tree.leaves({side: params[side]["logits"] for side in ("first", "second")})}
    assert bits == {config.bits}


def test_studies_ask_for_what_configs_have():
    for study in cmimh.STUDIES:
        config = cli.load_config(study.config, {})
        calls = []

        def run(cells, calls=calls):
            calls.append(cells)
            one = {
                f"{part}/{name}": [1.0, 2.0] for part in ("test", "validation") for name in ("cross", *hashing.TASKS)
            }
            one["private/private"] = [50.0, 60.0]
            of = {name: cell["only"] for name, cell in cells.items()}
            return {
                name: {"workdir": "", "stages": {arm: {"metrics": one} for arm in arms}} for name, arms in of.items()
            }

        found = run_study(study, run, (), [n for n in config.arms if n in (study.arms or config.arms)], cmimh.MEASURE)
        assert len(found["claims"]) == len(study.claims)
        for cells in calls:
            cli.load_config(study.config, next(iter(cells.values())))


def test_the_best_interior_gap_is_chosen_by_validation_rows():
    scores = {"gap_0": (9, 9), "gap_1": (1, 5), "gap_10": (3, 2), "gap_1000": (9, 9), "free_gap_1": (0, 7)}
    made = {
        name: {"metrics": {"validation/cross": [first], "test/cross": [second]}}
        for name, (first, second) in scores.items()
    }
    found = cmimh.best_interior(made)
    assert found["interior"]["metrics"]["test/cross"] == [2]
    assert found["free_interior"]["metrics"]["test/cross"] == [7]
    assert cmimh.best_interior({}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms.full.critic": "both"}, "Unknown arms.full.critic 'both'"),
        ({"arms.full.estimator": "hard"}, "Unknown arms.full.estimator 'hard'"),
        ({"arms.cca.kind": "ica"}, "Unknown arms.cca.kind 'ica'"),
        ({"arms.full.gap": -1.0}, "arms.full.gap must be finite and >= 0"),
        ({"arms.full.samples": 0}, "arms.full.samples must be finite and > 0"),
        ({"encoders.first.kind": "text"}, "Unknown encoders.first.kind 'text'"),
        ({"microbatches": 2}, "cannot be split"),
        ({"bits": 0}, "bits must be finite and > 0"),
        ({"only": ("ful",)}, "Did you mean 'full'"),
        ({"precision": "int8"}, "Unknown precision"),
        ({"data.query_examples": 1780}, "must leave some of the 1797 pairs"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        cmimh.stages(cli.load_config("configs/cmimh.py:smoke", changes))


def test_fewer_rows_than_bits_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"bits must lie in \[1, "):
        smoke(tmp_path / "run", "only=cca,", "seeds=1", "bits=40")
