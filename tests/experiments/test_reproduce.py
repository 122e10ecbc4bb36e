"""Verdicts by hand, and a reproduction whose runs are made up."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal
import time
from html import escape

import numpy as np
import pytest
from etils import epath

from experiments import cells, cli, cosine_kd, energy_kd, html, markdown, reproduce, studies
from experiments.distillation_setup import selected_arms
from jkd.errors import UserError
from jkd.train import NonFiniteError, Preempted
from jkd.train.workdir import flatten

CLAIM = studies.Claim("ours beats theirs", better="ours", worse="theirs")


def arms(**values):
    """Stages with these test accuracies."""
    return {name: {"metrics": {"test/top1": list(v)}} for name, v in values.items()}


def judged(differences, **changes):
    theirs = np.full(len(differences), 50.0)
    stages = arms(ours=theirs + differences, theirs=theirs)
    return studies.judge(dataclasses.replace(CLAIM, **changes), stages)


# mean 2, deviation .1 of three seeds: 2 -+ 4.3027 * .1 / sqrt(3) = 2 -+ .2484.
SPREAD = np.array([-0.1, 0.0, 0.1])


@pytest.mark.parametrize(
    ("differences", "margin", "verdict", "interval"),
    [
        (2 + SPREAD, 0.0, studies.HOLDS, [1.7516, 2.2484]),
        (-2 + SPREAD, 0.0, studies.REVERSED, [-2.2484, -1.7516]),
        (SPREAD, 0.0, studies.OPEN, [-0.2484, 0.2484]),
        (0.2 + SPREAD, 0.0, studies.OPEN, [-0.0484, 0.4484]),  # a positive mean is not enough
        (SPREAD, 0.25, studies.HOLDS, [-0.2484, 0.2484]),  # not worse by more than the margin
        (SPREAD, 0.24, studies.OPEN, [-0.2484, 0.2484]),
        (-1 + SPREAD, 0.5, studies.REVERSED, [-1.2484, -0.7516]),
        (-0.6 + SPREAD, 0.5, studies.OPEN, [-0.8484, -0.3516]),
    ],
)
def test_verdicts_of_paired_claims(differences, margin, verdict, interval):
    row = judged(differences, margin=margin)
    assert row["verdict"] == verdict
    np.testing.assert_allclose(row["interval"], interval, atol=1e-4)
    assert row["effect"] == pytest.approx(np.mean(differences))
    assert row["seeds"] == 3
    assert 0 <= row["p_value"] <= 1
    assert row["test"] == f"ours - theirs > {-margin:g}"
    assert row["paper"] == "no figure"


@pytest.mark.parametrize(
    ("inside", "verdict"), [((1.75, 2.25), studies.HOLDS), ((1.8, 2.25), studies.OPEN), ((3, 4), studies.OPEN)]
)
def test_verdicts_of_values(inside, verdict):
    claim = studies.Claim("the share is two", value=("ours", "groups/share"), inside=inside)
    row = studies.judge(claim, {"ours": {"metrics": {"groups/share": list(2 + SPREAD)}}})
    assert row["verdict"] == verdict
    np.testing.assert_allclose(row["interval"], [1.7516, 2.2484], atol=1e-4)
    assert row["p_value"] is None


CLAIM_OF_VALUE = studies.Claim("above 50", value=("ours", "test/top1"), inside=(50.0, 60.0))


def tuned(**scores):
    return {name: {"metrics": {"validation/top1": v}} for name, v in scores.items()}


def test_each_arm_gets_its_best_rate_and_ties_the_lower():
    scores = {"a": {0.1: 65.0, 0.01: 66.0, 0.03: 60.0}, "b": {0.1: 50.0, 0.01: 50.0, 0.03: -np.inf}}
    assert studies.best_rates(scores) == {"a": 0.01, "b": 0.01}
    assert studies.best_rates({"a": {0.1: 70.0, 0.01: 66.0}}) == {"a": 0.1}
    with pytest.raises(UserError, match="Arm 'a' diverged at all of the rates"):
        studies.best_rates({"a": {0.1: -np.inf}})


STUDY = studies.Study("tiny", "configs/energy_kd.py:smoke", (0.01, 0.1), 2, [CLAIM])


def one_by_one(run):
    return lambda cells: {cell: run(cell, changes) for cell, changes in cells.items()}


def test_a_study_tunes_on_other_seeds_and_shares_its_teachers():
    calls = {}

    def run(cell, overrides):
        calls[cell] = dict(overrides)
        if cell == "tuning-theirs-0.1":
            return NonFiniteError("loss is not finite")
        rates = [overrides.get(f"arms.{arm}.lr", 0) for arm in ("ours", "theirs")]
        stages = tuned(ours=[rates[0]] * 2, theirs=[rates[1]] * 2)
        stages |= {"teacher": {"metrics": {"test/top1": [99.0] * 3}}}
        if cell.startswith("final"):
            stages |= arms(ours=52 + SPREAD, theirs=[50.0] * 3)
        return {"workdir": f"/cells/{cell}", "stages": stages}

    found = studies.run_study(STUDY, one_by_one(run), ["teacher"], ["ours", "theirs"])
    tuning = {"seed": 1000, "seeds": 2}
    taught = {"teacher.workdir": "/cells/tuning-teachers"}
    final = {"teacher.workdir": "/cells/teachers"}
    assert calls == {
        "tuning-teachers": {**tuning, "only": ("teacher",)},
        "tuning-ours-0.01": {**tuning, **taught, "only": ("ours",), "arms.ours.lr": 0.01},
        "tuning-ours-0.1": {**tuning, **taught, "only": ("ours",), "arms.ours.lr": 0.1},
        "tuning-theirs-0.01": {**tuning, **taught, "only": ("theirs",), "arms.theirs.lr": 0.01},
        "tuning-theirs-0.1": {**tuning, **taught, "only": ("theirs",), "arms.theirs.lr": 0.1},
        "teachers": {"only": ("teacher",)},
        "final-ours": {**final, "only": ("ours",), "arms.ours.lr": 0.1},
        "final-theirs": {**final, "only": ("theirs",), "arms.theirs.lr": 0.01},
    }
    assert found["rates"] == {"ours": 0.1, "theirs": 0.01}
    assert found["tuning"] == {"ours": {"0.01": 0.01, "0.1": 0.1}, "theirs": {"0.01": 0.01, "0.1": None}}
    assert [claim["verdict"] for claim in found["claims"]] == [studies.HOLDS]
    assert found["stages"]["teacher"]["metrics"]["test/top1"] == [99.0] * 3


def test_rates_beyond_an_edge_and_arms_without_a_rate():
    best, calls = {"low": 0.0003, "middle": 0.003, "high": 3.0}, {}

    def run(cell, overrides):
        calls[cell] = overrides
        (arm,) = overrides["only"]
        rate = overrides.get(f"arms.{arm}.lr", 1.0)
        found = tuned(**{arm: [-abs(np.log(rate / best.get(arm, 1.0)))] * 2})
        return {"workdir": f"/cells/{cell}", "stages": found | (arms(**{arm: [50.0] * 3}) if "final" in cell else {})}

    study = dataclasses.replace(STUDY, rates=(0.001, 0.003, 0.01), claims=[], fixed=("none",), widen=2)
    found = studies.run_study(study, one_by_one(run), [], [*best, "none"])
    assert found["rates"] == {"low": 0.0003, "middle": 0.003, "high": 0.09}
    assert {arm: list(tried) for arm, tried in found["tuning"].items()} == {
        "low": ["0.001", "0.003", "0.01", "0.0003", "9e-05"],
        "middle": ["0.001", "0.003", "0.01"],
        "high": ["0.001", "0.003", "0.01", "0.03", "0.09"],
    }
    assert [cell for cell in calls if "none" in cell] == ["final-none"]
    assert calls["final-none"] == {"only": ("none",)}


def test_a_study_without_rates_is_one_run_of_all_arms():
    calls = {}

    def run(cell, overrides):
        calls[cell] = dict(overrides)
        return {"workdir": "/cells/whole", "stages": arms(ours=52 + SPREAD, theirs=[50.0] * 3, teacher=[99.0] * 3)}

    study = dataclasses.replace(STUDY, rates=())
    found = studies.run_study(study, one_by_one(run), ["teacher"], ["ours", "theirs"])
    assert calls == {"whole": {"only": ("teacher", "ours", "theirs")}}
    assert (found["rates"], found["tuning"]) == ({}, {})
    assert list(found["stages"]) == ["ours", "theirs", "teacher"]
    assert [claim["verdict"] for claim in found["claims"]] == [studies.HOLDS]


def test_claims_about_what_is_made_of_the_final_runs():
    def derived(stages):
        return {"both": {"metrics": {"sum": np.add(*(stages[name]["metrics"]["test/top1"] for name in both))}}}

    def run(cell, overrides):
        return {"workdir": "", "stages": given[cell.startswith("final")]}

    both = ("ours", "theirs")
    given = {False: tuned(ours=[1.0], theirs=[1.0]), True: arms(ours=52 + SPREAD, theirs=[50.0] * 3)}
    claim = studies.Claim("both make a hundred", value=("both", "sum"), inside=(101, 103))
    study = dataclasses.replace(STUDY, claims=[claim], derived=derived)
    found = studies.run_study(study, one_by_one(run), [], list(both))
    assert [row["verdict"] for row in found["claims"]] == [studies.HOLDS]
    assert list(found["stages"]) == ["ours", "theirs", "both"]


def test_an_interaction_is_a_difference_of_differences():
    claim = studies.Claim("more for a", better=["a_mix", "b"], worse=["a", "b_mix"])
    stages = arms(a=50 + SPREAD, a_mix=53 + SPREAD, b=[60.0] * 3, b_mix=61 + SPREAD)
    row = studies.judge(claim, stages)
    assert row["effect"] == pytest.approx(2.0)
    assert row["interval"] == pytest.approx([1.7516, 2.2484], abs=1e-4)
    assert row["test"] == "(a_mix + b) - (a + b_mix) > -0"
    assert row["verdict"] == studies.HOLDS


def stage(values, **more):
    metrics = {"test/top1": list(values), "validation/top1": list(values), **more}
    history = {name: {"last": v, "max": v, "min": v} for name, v in metrics.items()}
    return {"steps": 2, "metrics": metrics, "history": history}


def test_the_page_escapes_and_holds_every_claim():
    rows = [
        {**judged(2 + SPREAD), "claim": "<b>ours</b> & theirs", "p_holm": 0.5},
        {**judged(-2 + SPREAD), "claim": "second", "p_holm": 0.5},
        {**judged(SPREAD), "claim": "third", "p_value": None},
    ]
    stages = {name: stage(50 + SPREAD) for name in ("teacher", "kd", "ours")}
    tuning = {"kd": {"0.001": 49.0, "0.01": 50.0, "0.1": None}, "ours": {"0.01": 49.0, "0.1": 50.0}}
    rates = {"kd": 0.01, "ours": 0.1}
    good = {"config": "a.py", "rates": rates, "tuning": tuning, "stages": stages, "claims": rows}
    page = html.page({"energy_kd": {"digits": good, "large": {"config": "b.py", "not_run": "no <data>"}}})
    assert "&lt;b&gt;ours&lt;/b&gt; &amp; theirs" in page
    assert "<b>ours" not in page
    assert "<td class='holds'>holds</td>" in page
    assert "<td class='reversed'>the reverse holds</td>" in page
    assert "<td class='open'>not at this scale</td>" in page
    assert "[+1.75, +2.25]" in page
    assert "Not run: no &lt;data&gt;" in page
    assert "src='data:image/png;base64,iVBOR" in page
    assert page.count("(the edge of those tried)") == 1
    assert page.count("http") == 0  # nothing is loaded from elsewhere
    lines = markdown.page(
        {"energy_kd": {"digits": good, "large": {"config": "b.py", "not_run": "no data"}}}
    ).splitlines()
    wanted = "| <b>ours</b> & theirs | no figure | +2.00 | +1.75 .. +2.25 | P | 0.500 | 3 | holds |"
    assert wanted.replace("P", f"{rows[0]['p_value']:.3f}") in lines
    assert "| third | no figure | +0.00 | -0.25 .. +0.25 |  |  | 3 | not at this scale |" in lines
    assert "| `kd` | 0.01 | 50.00 |" in lines
    assert "| `teacher` |  | 50.00 |" in lines
    assert lines[-3:] == ["### large: `b.py`", "", "Not run: no data"]


@pytest.fixture
def made_up(monkeypatch):
    """Replaces training by made-up results, kept in the cell's folder like real ones; counts what is begun."""
    begun = []

    def run(config, workdir, *, show):
        assert not show
        file = pathlib.Path(workdir) / "results.json"
        if not file.exists():
            begun.append(file.parent.name.rpartition("-")[0])
            file.parent.mkdir(parents=True)
            names = ["teacher", *selected_arms(config)]
            more = {"energy/rank_correlation_confidence": [-0.9, -0.9]}
            more |= {"energy/accuracy_low_energy": [99, 98], "energy/accuracy_high_energy": [60, 61]}
            more |= {"groups/share_low": [0.3, 0.3], "groups/share_high": [0.3, 0.3]}
            found = {n: stage([50 + ORDER.index(n), 51 + ORDER.index(n)], **more) for n in names}
            file.write_text(json.dumps({"stages": found, "config": flatten(config.to_dict())}))
        return json.loads(file.read_text())

    monkeypatch.setattr(cells.train, "run", run)
    monkeypatch.setattr(cells, "default_jobs", lambda: 1)
    study = dataclasses.replace(STUDY, claims=energy_kd.CLAIMS)
    monkeypatch.setattr(energy_kd, "STUDIES", (study,))
    return begun


ARMS = list(cli.load_config(STUDY.config).arms)
ORDER = ["teacher", *ARMS, "cskd"]
TUNING = [f"tuning-{arm}-{rate}" for arm in ARMS for rate in (0.01, 0.1)]
CELLS = ["tuning-teachers", "teachers", *TUNING, *(f"final-{arm}" for arm in ARMS)]


def test_reproduce_writes_its_report(made_up, tmp_path, capsys):
    reproduce.main(["energy_kd", "--out", str(tmp_path), "--config.seeds=3"])
    assert made_up == CELLS
    study = json.loads((tmp_path / "results.json").read_text())["energy_kd"]["tiny"]
    verdicts = {claim["claim"]: claim["verdict"] for claim in study["claims"]}
    assert len(verdicts) == len(energy_kd.CLAIMS)
    assert verdicts["KD beats training on labels alone"] == studies.HOLDS  # every later arm is one point better
    assert verdicts["Energy DKD beats DKD"] == studies.HOLDS
    assert verdicts["low energy goes with high confidence (rank correlation)"] == studies.HOLDS
    page = (tmp_path / "report.html").read_text()
    assert all(escape(claim.text) in page for claim in energy_kd.CLAIMS)
    assert "Energy DKD beats DKD" in capsys.readouterr().out
    (cell,) = (tmp_path / "cells").glob("final-kd-????????/results.json")
    config = json.loads(cell.read_text())["config"]
    assert config["seeds"] == 3
    assert config["method"] == "arms"
    assert {name.split(".")[1] for name in config if name.startswith("arms.")} == {"kd"}


def test_methods_share_equal_cells(made_up, tmp_path, monkeypatch):
    reproduce.main(["energy_kd", "--out", str(tmp_path)])
    made_up.clear()
    study = studies.Study("tiny", "configs/cosine_kd.py:smoke", (0.01, 0.1), 2, [], ("kd", "cskd"))
    monkeypatch.setattr(cosine_kd, "STUDIES", (study,))
    reproduce.main(["cosine_kd", "--out", str(tmp_path)])
    assert made_up == ["tuning-cskd-0.01", "tuning-cskd-0.1", "final-cskd"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["energy_kd", "cosine_kd"]
    assert found["cosine_kd"]["tiny"]["stages"]["kd"] == found["energy_kd"]["tiny"]["stages"]["kd"]


def test_studies_side_by_side_run_what_they_share_once(made_up, tmp_path, monkeypatch):
    pool = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(cells.concurrent.futures, "ProcessPoolExecutor", lambda jobs, *rest: pool(jobs))
    other = dataclasses.replace(STUDY, name="other", claims=energy_kd.CLAIMS[:1])
    monkeypatch.setattr(energy_kd, "STUDIES", (*energy_kd.STUDIES, other))
    reproduce.main(["energy_kd", "--out", str(tmp_path / "two"), "--jobs", "2"])
    assert sorted(made_up) == sorted(CELLS)
    reproduce.main(["energy_kd", "--out", str(tmp_path / "one"), "--jobs", "1"])
    two, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert list(two["energy_kd"]) == ["tiny", "other"]
    assert two == one


def test_reproduce_stops_by_its_budget_and_goes_on(made_up, tmp_path, capsys):
    begin = reproduce.main
    begin(["energy_kd", "--out", str(tmp_path), "--budget", "0"])
    assert made_up == []
    says = "stopped by --budget before cell tuning-teachers; run the same command again to go on"
    assert says in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["energy_kd"]["tiny"]["not_run"] == says
    assert says in (tmp_path / "report.html").read_text()
    # A budget that ends after two cells.
    deadline, run = time.monotonic() + 3600, cells.train.run

    def two(*args, **named):
        found = run(*args, **named)
        if len(made_up) == 2:
            clock[0] = deadline + 1
        return found

    clock = [deadline - 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells.time, "monotonic", lambda: clock[0])
        patch.setattr(cells.train, "run", two)
        reproduce.reproduce(["energy_kd"], epath.Path(tmp_path), deadline)
    assert made_up == CELLS[:2]
    assert f"before cell {CELLS[2]}" in capsys.readouterr().err
    begin(["energy_kd", "--out", str(tmp_path)])
    assert made_up == CELLS
    assert "claims" in json.loads((tmp_path / "results.json").read_text())["energy_kd"]["tiny"]


def test_a_finished_report_survives_what_cannot_run(made_up, tmp_path, capsys, monkeypatch):
    reproduce.main(["energy_kd", "--out", str(tmp_path)])
    other = {"large": {"config": "b.py", "not_run": "no data"}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"another": other}))
    before = json.loads(file.read_text())
    monkeypatch.setattr(reproduce, "run_study", lambda *args: (_ for _ in ()).throw(UserError("the disk is gone")))
    reproduce.main(["energy_kd", "--out", str(tmp_path)])
    assert json.loads(file.read_text()) == before
    assert "the disk is gone" in capsys.readouterr().err


def test_cells_in_several_processes_come_in_order(tmp_path):
    made = [
        cells.Cell(f"c{k}", f"c{k}", STUDY.config, {"only": ("teacher",), "seed": k}, str(tmp_path)) for k in range(5)
    ]
    for k, cell in enumerate(made):
        workdir = tmp_path / f"c{k}-{cells.identity(cells.cell_config(cli.load_config(cell.config, cell.overrides)))}"
        workdir.mkdir()
        (workdir / "results.json").write_text(json.dumps({"stages": k}))
    late = dataclasses.replace(made[0], name="late", deadline=0.0)
    with cells.workers(2) as run_cells:
        found = list(run_cells(made))
        with pytest.raises(cells.OutOfTimeError, match="stopped by --budget before cell late"):
            list(run_cells([late]))
    assert [one["stages"] for one in found] == [*range(5)]
    assert all(one["workdir"].startswith(str(tmp_path / f"c{k}-")) for k, one in enumerate(found))


def stopped():
    with cells.workers(2) as run_cells:
        os.kill(os.getpid(), signal.SIGTERM)
        return run_cells([])


def test_sigterm_is_passed_on():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="run the same command again"):
        stopped()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=3", "--config.seed is set by the studies themselves"),
        ("only=ce,kd", "--config.only is set by the studies themselves"),
        ("arms.kd.lr=0.3", "--config.arms.kd.lr is set by the studies themselves"),
        ("sedes=3", "Did you mean 'seeds'?"),
        ("seeds=1", "seeds=1: differences between arms need at least 2 paired seeds."),
        ("data.validation_examples=0", "data.validation_examples=0: the arms' learning rates are tuned on"),
    ],
)
def test_overrides_that_no_study_can_run_with(override, says, refused, untouched):
    assert says in refused(reproduce.main, "energy_kd", "--out", untouched() / "out", f"--config.{override}")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", "{}", "is the folder of a training run: give --out a folder of its own."),
        ("results.json", "{", "is damaged: it holds no JSON."),
        ("results.json", '{"method": "energy_kd"}', "is no report of this command"),
        ("results.json", "[]", "is no report of this command"),
    ],
)
def test_folders_that_hold_something_else(name, text, says, refused, tmp_path):
    (tmp_path / name).write_text(text)
    assert says in refused(reproduce.main, "energy_kd", "--out", tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, text)]


def test_reproduce_refuses_what_it_cannot_write_or_wait_for(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file cannot be written: " in refused(reproduce.main, "energy_kd", "--out", tmp_path / "file")
    line = refused(reproduce.main, "energy_kd", "--out", tmp_path / "out", "--budget", "-1")
    assert "--budget must be >= 0 minutes, got -1.0." in line
    line = refused(reproduce.main, "energy_kd", "--out", tmp_path / "out", "--jobs", "0")
    assert "--jobs must be >= 1, got 0." in line


def test_p_values_are_adjusted_for_their_number():
    spread = np.array([0.9, 1.0, 1.1, 1.2, 0.8])
    stages = arms(ours=50 + spread, theirs=[50.0] * 5)
    one, two, value = studies.judge_all([CLAIM, CLAIM, CLAIM_OF_VALUE], stages)
    assert one["p_holm"] == two["p_holm"] == 2 * one["p_value"] < 0.05
    assert one["verdict"] == studies.HOLDS
    assert "p_holm" not in value


def test_a_verdict_says_when_it_does_not_survive_correction():
    # t = sqrt(5) 1.14 / .669 = 3.81 with 4 degrees of freedom: p = .019; twice that is below .05, three times above.
    stages = arms(ours=50 + np.array([0.2, 1.0, 1.0, 1.5, 2.0]), theirs=[50.0] * 5, same=[50.0] * 5)
    reverse = studies.Claim("theirs beats ours", better="theirs", worse="ours")
    none = studies.Claim("nothing", better="theirs", worse="same")
    rows = studies.judge_all([CLAIM, reverse], stages)
    assert [row["verdict"] for row in rows] == [studies.HOLDS, studies.REVERSED]
    rows = studies.judge_all([CLAIM, reverse, none], stages)
    assert [row["verdict"] for row in rows] == [
        "holds before correction",
        "the reverse holds before correction",
        studies.OPEN,
    ]


def test_the_p_value_of_a_margin_is_that_of_its_verdict():
    # -.1 -+ .1: 1.73 standard errors from 0 and 2.6 from -.25 (4.3 are needed).
    assert judged(-0.1 + SPREAD)["p_value"] == pytest.approx(0.225, abs=1e-3)
    assert judged(-0.1 + SPREAD, margin=0.25)["p_value"] == pytest.approx(0.1215, abs=1e-3)
    row = judged(SPREAD, margin=0.25)
    assert (row["verdict"], row["p_value"] < 0.05) == (studies.HOLDS, True)


def test_any_metric_can_be_compared():
    claim = studies.Claim("low beats high", better=("ours", "a/low"), worse=("ours", "a/high"))
    row = studies.judge(claim, {"ours": {"metrics": {"a/low": list(2 + SPREAD), "a/high": [0.0] * 3}}})
    assert (row["effect"], row["verdict"]) == (pytest.approx(2), studies.HOLDS)
    assert row["test"] == "ours a/low - ours a/high > -0"


def test_reproduce_refuses_unknown_methods(refused, untouched):
    line = refused(reproduce.main, "energy-kd", "--out", untouched() / "out")
    assert "Unknown method 'energy-kd'. Did you mean 'energy_kd'?" in line
    line = refused(reproduce.main, "cmimh:fashon", "--out", untouched() / "out")
    assert "Unknown study of cmimh 'fashon'. Did you mean 'fashion'?" in line


def test_extra_studies_run_where_they_are_named(monkeypatch):
    extra = dataclasses.replace(STUDY, name="large", extra=True)
    monkeypatch.setattr(energy_kd, "STUDIES", (STUDY, extra))
    assert reproduce.chosen(["energy_kd"]) == [("energy_kd", STUDY)]
    assert reproduce.chosen(["energy_kd:large", "energy_kd"]) == [("energy_kd", extra), ("energy_kd", STUDY)]
    assert reproduce.chosen(["energy_kd", "energy_kd:tiny"]) == [("energy_kd", STUDY)]


def test_a_study_without_rates_needs_no_validation_rows(made_up, tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, rates=(), claims=[], arms=("ce", "kd"))
    monkeypatch.setattr(energy_kd, "STUDIES", (study,))
    reproduce.main(["energy_kd", "--out", str(tmp_path), "--config.data.validation_examples=0"])
    assert made_up == ["whole"]
    found = json.loads((tmp_path / "results.json").read_text())["energy_kd"]["tiny"]
    assert list(found["stages"]) == ["teacher", "ce", "kd"]
    page = (tmp_path / "report.html").read_text()
    assert "Nothing was tuned: every arm has the learning rate of the config." in page
    assert "the edge of those tried" not in page


def test_the_shipped_studies_name_real_arms():
    for study in energy_kd.STUDIES:
        config = cli.load_config(study.config)
        for claim in study.claims:
            named = [claim.better, claim.worse] if claim.value is None else [claim.value]
            stages = {one if isinstance(one, str) else one[0] for one in named}
            assert stages <= {*config.arms, "teacher"}
