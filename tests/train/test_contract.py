"""What a stage may ask of the loop, and what the loop leaves behind."""

import dataclasses
import json
import os
import shutil
import signal
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from sklearn.cluster import KMeans

from jkd import data, train
from jkd.train.passes import Residents

ONE = train.make_mesh(devices=jax.devices()[:1])
QUIET = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=False)


def go(stages, workdir, mesh=ONE, options=QUIET, **changes):
    changes = {"log_every": 10} | changes
    return train.run(stages, workdir=workdir, mesh=mesh, options=options, **changes)


def counter(**fields) -> train.Stage:
    """A stage without batches: its state is a number that grows by t at every step."""

    def step(key, state, consts, batch, t):
        assert batch is None
        state = state | {"x": state["x"] + t}
        return state, {"x": state["x"]}

    start = {"name": "count", "num_steps": 7, "init": lambda key, previous, consts: {"x": jnp.float32(0)}}
    return train.Stage(**(start | {"step": step} | fields))


# --- what stages see of each other ---


def test_students_share_a_teacher_and_see_exactly_their_needs(tmp_path):
    seen = {}

    def prepare(key, previous, sweep):
        seen[len(seen)] = previous
        return {"teacher": previous["teacher"].published} if previous else {}

    teacher = toys.classifier(num_steps=20, snapshots=(5, 20), prepare=prepare)
    students = [toys.student(f"student-{i}", 5) for i in range(2)]
    students = [dataclasses.replace(s, prepare=prepare) for s in students]
    results = go([teacher, *students, toys.classifier("last", 0, needs=("student-1", "teacher"))], tmp_path)
    assert list(results) == ["teacher", "student-0", "student-1", "last"]
    assert [set(previous) for previous in seen.values()] == [set(), {"teacher"}, {"teacher"}]
    outcome = seen[1]["teacher"]
    assert outcome.members == 0
    assert outcome.metrics == {"train/accuracy": results["teacher"]["metrics"]["train/accuracy"]}
    assert set(outcome.snapshots) == {5, 20}
    jax.tree.map(np.testing.assert_array_equal, outcome.snapshots[20], outcome.published)
    assert (
        np.abs(outcome.snapshots[5]["params"]["head"]["bias"] - outcome.published["params"]["head"]["bias"]).max() > 0
    )
    finals = [toys.final(tmp_path, f"student-{i}") for i in range(2)]
    for name in finals[0]:
        if "kernel" in name and name.startswith("[0]"):
            assert not np.array_equal(finals[0][name], finals[1][name]), "each stage has its own key"


def test_a_stage_may_cluster_the_embeddings_of_a_sweep(tmp_path):
    source = data.MemorySource(toys.DIGITS, 16)

    def embed(params, batch, key):
        x = batch["image"].reshape(batch["image"].shape[0], -1) / 255.0
        return {"embedding": jax.nn.relu(x @ params["hidden"]["kernel"]), "index": batch["index"]}

    def prepare(key, previous, sweep):
        rows = sweep(embed, previous["teacher"].published["params"], source)
        np.testing.assert_array_equal(rows["index"], np.arange(256))
        assert isinstance(rows["embedding"], np.ndarray)
        found = KMeans(4, n_init=3, random_state=0).fit(rows["embedding"])
        return {"pseudo": found.labels_.astype(np.int32), "centers": found.cluster_centers_}

    def step(key, state, consts, batch, t):
        batch = batch | {"label": consts["pseudo"][batch["index"]]}
        return toys.step(key, state, consts, batch, t)

    def collect(published, consts, batch, mask):
        found = toys.logits(published["params"], batch["image"]).argmax(-1)
        return {"correct": ((found == consts["pseudo"][batch["index"]]) & mask).sum(), "total": mask.sum()}

    evaluator = train.Evaluator(source, collect, toys.finish_correct)
    clusters = toys.classifier(
        "clusters", 60, needs=("teacher",), prepare=prepare, step=step, evaluators={"pseudo": evaluator}
    )
    results = go([toys.classifier(), clusters], tmp_path, mesh=train.make_mesh(devices=jax.devices()[:2]))
    assert results["clusters"]["metrics"]["pseudo/accuracy"] > 0.9
    assert train.load_outcome(tmp_path, "clusters").consts["centers"].shape == (4, 32)


def test_late_resetting_starts_from_a_snapshot(tmp_path):
    def init(key, previous, consts):
        return train.create_state(previous["teacher"].snapshots[7], toys.OPTIMIZER)

    reset = toys.classifier("reset", 0, needs=("teacher",), init=init)
    brief = toys.classifier("teacher", 7)  # the same key and batches, but it stops where the snapshot was taken
    go([toys.classifier(num_steps=12, snapshots=(7,)), reset], tmp_path / "a")
    go([brief], tmp_path / "b")
    found, wanted = toys.final(tmp_path / "a", "reset"), toys.final(tmp_path / "b", "teacher")
    assert found.keys() == wanted.keys()
    assert len(found) == 4
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_stage_without_batches_alternates_on_its_constants(tmp_path):
    # Rank-one factorization by alternating least squares: u and v in turn, each solved exactly.
    u, v = np.arange(1.0, 7.0, dtype=np.float32), np.arange(4.0, 0.0, -1.0, dtype=np.float32)

    def step(key, state, consts, batch, t):
        assert batch is None

        def solve_u(state):
            return state | {"u": consts["matrix"] @ state["v"] / (state["v"] ** 2).sum()}

        def solve_v(state):
            return state | {"v": consts["matrix"].T @ state["u"] / (state["u"] ** 2).sum()}

        state = jax.lax.cond(t % 2 == 0, solve_u, solve_v, state)
        return state, {"error": ((jnp.outer(state["u"], state["v"]) - consts["matrix"]) ** 2).sum()}

    stage = train.Stage(
        "factors",
        2,
        lambda key, previous, consts: {"u": jnp.zeros(6), "v": jax.random.normal(key, (4,))},
        step,
        prepare=lambda key, previous, sweep: {"matrix": np.outer(u, v)},
    )
    go([stage], tmp_path, mesh=train.make_mesh())
    found = train.load_outcome(tmp_path, "factors").published
    np.testing.assert_allclose(np.outer(found["u"], found["v"]), np.outer(u, v), rtol=1e-4)


def test_a_stage_of_no_steps_prepares_and_publishes(tmp_path):
    stage = train.Stage(
        "table",
        0,
        lambda key, previous, consts: {"twice": 2 * consts["x"], "unused": jnp.zeros(3)},
        prepare=lambda key, previous, sweep: {"x": np.arange(3.0, dtype=np.float32)},
        publish=lambda state: (state["twice"], [None, {"y": state["twice"] > 1}]),
    )
    results = go([stage], tmp_path)
    assert results == {"table": {"steps": 0, "metrics": {}, "history": {}}}
    published = train.load_outcome(tmp_path, "table").published
    assert isinstance(published, tuple)
    np.testing.assert_array_equal(published[0], [0, 2, 4])
    assert published[1][0] is None
    np.testing.assert_array_equal(published[1][1]["y"], [False, True, True])


def test_what_is_published_is_evaluated_not_the_state(tmp_path):
    seen = train.Evaluator(
        data.MemorySource(toys.DIGITS, 64),
        lambda published, consts, batch, mask: {"mean": published["mean"] * mask.sum() / 256},
        lambda sums: {"mean": float(sums["mean"])},
    )

    def init(key, previous, consts):
        return {"x": jnp.float32(0), "sum": jnp.float32(0)}

    def step(key, state, consts, batch, t):
        x = state["x"] + t
        return {"x": x, "sum": state["sum"] + x}, {"x": x}

    stage = counter(
        init=init, step=step, publish=lambda s: {"mean": s["sum"] / 4}, num_steps=4, evaluators={"seen": seen}
    )
    results = go([stage], tmp_path)
    assert results["count"]["metrics"] == {"seen/mean": (0 + 1 + 3 + 6) / 4}
    assert toys.final(tmp_path, "count").keys() == {"[0]['mean']"}


def test_step_key_and_counter_come_from_the_loop(tmp_path):
    def step(key, state, consts, batch, t):
        return state, {"t": t, "draw": jax.random.uniform(key)}

    key = jax.random.key(11)
    go([counter(step=step, num_steps=3, key=key)], tmp_path, log_every=1)
    stage_key = jax.random.split(key, 3)[2]
    assert toys.logged(tmp_path, "t") == [0, 1, 2]
    draws = [float(jax.random.uniform(jax.random.fold_in(stage_key, t))) for t in range(3)]
    assert toys.logged(tmp_path, "draw") == draws


# --- evaluation and sweeps ---


@pytest.mark.parametrize("count", [1, 8])
def test_gathered_rows_are_exact_in_order_and_without_padding(count, tmp_path):
    gathered = []

    def collect(published, consts, batch, mask):
        return {"index": batch["index"], "image": batch["image"], "real": mask}

    def finish(rows):
        gathered.append(rows)
        return {"rows": len(rows["index"])}

    subset = toys.DIGITS.subset(np.random.RandomState(0).permutation(256)[:83])
    evaluator = train.Evaluator(data.MemorySource(subset, 24, seed=5), collect, finish, kind="gather")
    results = go(
        [counter(evaluators={"all": evaluator})], tmp_path, mesh=train.make_mesh(devices=jax.devices()[:count])
    )
    assert results["count"]["metrics"] == {"all/rows": 83}
    (rows,) = gathered
    np.testing.assert_array_equal(rows["index"], subset.indices)
    np.testing.assert_array_equal(rows["image"], subset.read(np.arange(83))["image"])
    assert rows["real"].all()


@pytest.mark.parametrize("count", [1, 8])
def test_sums_leave_the_padding_out(count, tmp_path):
    def collect(published, consts, batch, mask):
        return {"labels": jnp.where(mask, batch["label"], 0).sum(), "rows": mask.sum()}

    subset = toys.DIGITS.subset(np.arange(255, 255 - 83, -1))
    evaluator = train.Evaluator(
        lambda consts: data.MemorySource(subset, 24), collect, lambda sums: {n: int(v) for n, v in sums.items()}
    )
    mesh = train.make_mesh(devices=jax.devices()[:count])
    results = go([counter(evaluators={"all": evaluator})], tmp_path, mesh=mesh)
    assert results["count"]["metrics"] == {"all/labels": int(subset.labels.sum()), "all/rows": 83}


@pytest.mark.parametrize("count", [1, 8])
def test_a_sweep_visits_as_training_does(count, tmp_path):
    source = data.MemorySource(toys.DIGITS.take(83), 24, seed=5)
    swept, key = [], jax.random.key(4)

    def rows(scale, batch, key):
        return {"index": batch["index"], "draw": scale * jax.random.uniform(key, batch["index"].shape)}

    def prepare(unused, previous, sweep):
        swept.append(sweep(rows, jnp.float32(3), source, key))
        swept.append(sweep(lambda a, b, k: b["index"], None, source.in_order()))
        return {}

    go([counter(prepare=prepare)], tmp_path, mesh=train.make_mesh(devices=jax.devices()[:count]))
    found, ordered = swept
    assert len(found["index"]) == 72, "three full batches of 24; the last partial one is dropped"
    np.testing.assert_array_equal(found["index"], np.concatenate([source.local(t)["index"] for t in range(3)]))
    draws = [3 * jax.random.uniform(jax.random.fold_in(key, t), (24,)) for t in range(3)]
    np.testing.assert_allclose(found["draw"], np.concatenate(draws), rtol=1e-6)
    np.testing.assert_array_equal(ordered, np.arange(83))


# --- compilation ---


def test_one_compile_a_stage_and_none_between_boundaries(tmp_path):
    boundaries = []

    def finish(sums):
        boundaries.append(len(names))
        return toys.finish_correct(sums)

    evaluator = dataclasses.replace(toys.accuracy(every=8), finish=finish)
    stage = toys.classifier(num_steps=48, evaluators={"train": evaluator})  # three epochs
    options = train.LoopOptions(checkpoint_every=8, progress=False)
    with toys.compiled() as names:
        go([stage], tmp_path, log_every=4, options=options)
    assert names.count("program") == 1
    assert names.count("init") == 1
    assert len(boundaries) == 6
    # After the second boundary (the first checkpoint is written behind the first evaluation) all is compiled.
    assert boundaries[1] == boundaries[5], names[boundaries[1] :]


def test_weakly_typed_states_do_not_compile_twice(tmp_path):
    def init(key, previous, consts):
        return {"x": jnp.asarray(0.0)}

    def step(key, state, consts, batch, t):
        return {"x": state["x"] + jnp.float32(1)}, {"one": 1.0}  # strongly typed; a Python number as a metric

    assert jax.eval_shape(init, None, None, None)["x"].weak_type
    with toys.compiled() as names:
        go([counter(init=init, step=step)], tmp_path)
    assert toys.logged(tmp_path, "one") == [1]
    assert names.count("program") == 1


def test_rounds_of_equal_shapes_share_the_compiled_step(tmp_path):
    def continue_from(name):
        return lambda key, previous, consts: train.create_state(previous[name].published, toys.OPTIMIZER)

    def fresh_step(*args):
        return toys.step(*args)

    def fresh_collect(*args):
        return toys.collect_correct(*args)

    common = {
        "step": fresh_step,
        "evaluators": {"train": dataclasses.replace(toys.accuracy(), collect=fresh_collect)},
    }
    rounds = [toys.classifier("round-0", 4, **common)]
    for i in (1, 2, 3):
        last = f"round-{i - 1}"
        rounds.append(toys.classifier(f"round-{i}", 4, needs=(last,), init=continue_from(last), **common))
    with toys.compiled() as names:
        go(rounds, tmp_path)
    assert names.count("program") == 1
    assert (names.count("one"), names.count("add")) == (1, 1), "the evaluation too"


@pytest.mark.parametrize("mode", ["vmap", "unroll"])
def test_a_lazy_branch_stays_a_branch_under_an_ensemble(mode):
    def lazy(key, state, consts, batch, t):
        state = jax.lax.cond(t % 16 == 0, lambda s: jnp.linalg.inv(s), lambda s: s + 1, state)
        return state, {"x": state[0, 0]}

    stage = counter(step=lazy, init=lambda key, previous, consts: jax.random.normal(key, (16, 16)))
    several = train.ensemble(stage, jax.random.split(jax.random.key(0), 3), mode)
    state = jnp.zeros((3, 16, 16))

    def text(t) -> str:
        step = jax.jit(several.step) if jnp.ndim(t) == 0 else jax.jit(jax.vmap(lazy, (0, 0, None, None, 0)))
        return step.lower(several.key, state, {}, None, t).compile().as_text()

    assert " conditional(" in text(jnp.int32(0))
    if mode == "vmap":
        assert " conditional(" not in text(jnp.zeros(3, jnp.int32)), "a counter in the state would be a select"


# --- what is written ---


def test_json_lines_hold_the_means_of_each_window(tmp_path):
    stage = counter(num_steps=7, evaluators={"train": sized(every=4)})
    go([stage, counter(name="again", num_steps=2)], tmp_path, log_every=3)
    x = np.cumsum(np.arange(7.0))
    assert toys.lines(tmp_path) == [
        {"stage": "count", "step": 3, "train": {"x": x[:3].mean()}},
        {"stage": "count", "step": 4, "evaluation": {"train/size": 256}},
        {"stage": "count", "step": 6, "train": {"x": x[3:6].mean()}},
        {"stage": "count", "step": 7, "train": {"x": x[6]}},
        {"stage": "count", "step": 7, "evaluation": {"train/size": 256}},
        {"stage": "again", "step": 2, "train": {"x": 0.5}},
    ]


def sized(every: int = 0) -> train.Evaluator:
    source = data.MemorySource(toys.DIGITS, 64)
    return train.Evaluator(source, count_rows, lambda total: {"size": int(total)}, every=every)


def count_rows(published, consts, batch, mask):
    return mask.sum()


def test_results_hold_last_best_and_worst(tmp_path):
    evaluator = train.Evaluator(
        data.MemorySource(toys.DIGITS, 64),
        lambda published, consts, batch, mask: published["x"] * mask.sum() / 256,
        lambda total: {"x": float(total)},
        every=1,
    )

    def step(key, state, consts, batch, t):
        return {"x": jnp.float32([3, -1, 5, 2])[t]}, {}

    results = go([counter(step=step, num_steps=4, evaluators={"seen": evaluator})], tmp_path)
    assert results["count"] == {
        "steps": 4,
        "metrics": {"seen/x": 2},
        "history": {"seen/x": {"last": 2, "max": 5, "min": -1}},
    }


def test_a_finished_run_returns_at_once(tmp_path):
    first = go([toys.classifier(num_steps=5), toys.student("student", 3)], tmp_path)
    written = (tmp_path / "metrics.jsonl").read_bytes()

    def never(*args):
        raise AssertionError("nothing is left to do")

    nothing = {"init": never, "step": never, "prepare": never, "data": never, "publish": never}
    stages = [toys.classifier(num_steps=5), toys.student("student", 3)]
    with toys.compiled() as names:
        again = go([dataclasses.replace(stage, **nothing) for stage in stages], tmp_path)
    assert again == first
    assert not {"init", "program", "one"} & set(names)
    assert (tmp_path / "metrics.jsonl").read_bytes() == written


def test_tensorboard_events_hold_the_scalars(tmp_path):
    options = train.LoopOptions(checkpoint_every=0, progress=False)
    results = go([toys.classifier(num_steps=20)], tmp_path, options=options)
    scalars = events(tmp_path / "tensorboard/00-teacher")
    assert scalars["train/loss"] == {
        r["step"]: np.float32(r["train"]["loss"]) for r in toys.lines(tmp_path) if "train" in r
    }
    assert set(scalars["train/loss"]) == {10, 20}
    assert set(scalars["evaluation/train/accuracy"]) == {16, 20}
    assert scalars["evaluation/train/accuracy"][20] == np.float32(results["teacher"]["metrics"]["train/accuracy"])
    assert scalars["speed/images_per_second"][20] > 0


def events(folder) -> dict[str, dict[int, float]]:
    """Reads TensorBoard event files: records of a length (8 bytes), its checksum (4), the event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[str, dict[int, float]] = {}
    for path in folder.iterdir():
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event, raw = Event.FromString(raw[12 : 12 + length]), raw[16 + length :]
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


# --- numbers that are not finite ---


def exploding(key, state, consts, batch, t):
    state, metrics = toys.step(key, state, consts, batch, t)
    return state, metrics | {"penalty": jnp.where(t < 13, 1.0, jnp.nan), "late": jnp.where(t < 14, 1.0, jnp.inf)}


@pytest.mark.parametrize(("log_every", "every"), [(10, 5), (4, 5), (20, 7)])
def test_a_metric_that_is_not_finite_stops_the_run(log_every, every, tmp_path):
    options = dataclasses.replace(QUIET, checkpoint_every=every)
    stage = toys.classifier(num_steps=20, step=exploding)
    with pytest.raises(train.NonFiniteError, match=r"Stage 'teacher', step 13: penalty is not finite") as caught:
        go([stage], tmp_path, log_every=log_every, options=options)
    last = 13 // every * every
    assert f"last good checkpoint is of step {last}" in str(caught.value)
    bundle = tmp_path / "debug/teacher-step-13"
    info = json.loads((bundle / "info.json").read_text())
    assert (info["stage"], info["step"], info["last_good_step"]) == ("teacher", 13, last)
    assert np.isnan(info["metrics"]["penalty"])
    assert np.isfinite(info["metrics"]["loss"])
    assert info["metrics"]["late"] == 1
    with np.load(bundle / "batch-0.npz") as saved:
        wanted = data.MemorySource(toys.DIGITS, 16, seed=3).batch(13)
        assert set(saved) == set(wanted)
        for name in saved:
            np.testing.assert_array_equal(saved[name], wanted[name])
    steps = [int(path.name) for path in (tmp_path / "checkpoints/00-teacher").iterdir()]
    assert max(steps) == last, "no checkpoint is made of a state that came after"
    assert all(np.isfinite(record["train"]["loss"]) for record in toys.lines(tmp_path))


def test_a_run_goes_on_from_before_the_step_that_was_not_finite(tmp_path):
    options = dataclasses.replace(QUIET, checkpoint_every=5)
    with pytest.raises(train.NonFiniteError):
        go([toys.classifier(num_steps=20, step=exploding)], tmp_path / "a", options=options)

    def mended(*args):
        state, metrics = toys.step(*args)
        return state, metrics | {"penalty": jnp.float32(1), "late": jnp.float32(1)}

    for name in ("a", "b"):
        go([toys.classifier(num_steps=20, step=mended)], tmp_path / name, options=options)
    found, wanted = toys.final(tmp_path / "a", "teacher"), toys.final(tmp_path / "b", "teacher")
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_state_with_nan_is_never_saved(tmp_path):
    optimizer = optax.sgd(1.0)

    def init(key, previous, consts):
        return train.create_state({"params": {"w": jnp.ones(2)}}, optimizer)

    def step(key, state, consts, batch, t):  # the metrics look fine
        params = {"w": jnp.where(t == 7, jnp.nan, state.params["w"])}
        return dataclasses.replace(state, params=params), {"loss": jnp.float32(0)}

    stage = counter(init=init, step=step, num_steps=20, publish=toys.variables)
    with pytest.raises(ValueError, match="Step 10: the state holds NaN in .*params/w"):
        go([stage], tmp_path, options=dataclasses.replace(QUIET, checkpoint_every=5))
    assert [path.name for path in (tmp_path / "checkpoints/00-count").iterdir()] == ["5"]


def test_a_state_that_ends_with_nan_is_never_published(tmp_path):
    def step(key, state, consts, batch, t):  # the metrics look fine
        return {"x": jnp.where(t == 6, jnp.nan, state["x"])}, {"loss": jnp.float32(0)}

    with pytest.raises(ValueError, match="After the last step of stage 'count': the state holds NaN in x"):
        go([counter(step=step)], tmp_path)
    assert not (tmp_path / "stages/00-count/outcome").exists()


# --- what else may happen around stages ---


def test_a_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = go([toys.classifier(num_steps=5)], "runs/here", options=train.LoopOptions(3, progress=False))
    assert list(results) == ["teacher"]
    assert "params" in train.load_outcome("runs/here", "teacher").published
    assert list(train.finished_stages("runs/here")) == ["teacher"]
    assert (tmp_path / "runs/here/stages").is_dir()


@pytest.mark.parametrize("moment", ["prepare", "finish"])
def test_sigterm_between_stages_stops_before_the_next(moment, tmp_path):
    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    evaluator = train.Evaluator(data.MemorySource(toys.DIGITS, 64), count_rows, stop)
    hooks = {"prepare": stop} if moment == "prepare" else {"evaluators": {"stop": evaluator}}
    stages = [counter(name="first", num_steps=0, **hooks), counter(name="second", num_steps=0)]
    before = "init of stage 'first'" if moment == "prepare" else "prepare of stage 'second'"
    with pytest.raises(train.Preempted, match=f"before {before}.*Run the same command again"):
        go(stages, tmp_path)
    go([dataclasses.replace(stages[0], prepare=lambda *args: {}, evaluators={}), stages[1]], tmp_path)
    assert list(train.finished_stages(tmp_path)) == ["first", "second"]


@pytest.mark.parametrize("field", [{"keep": 0}, {"checkpoint_every": -1}])
def test_options_that_would_lose_checkpoints_are_refused(field):
    with pytest.raises(ValueError, match="keep must be >= 1 and checkpoint_every >= 0"):
        train.LoopOptions(**field)


def test_a_rule_for_parameters_leaves_metrics_of_a_similar_name_whole(tmp_path):
    def step(key, state, consts, batch, t):
        state, metrics = toys.step(key, state, consts, batch, t)
        return state, metrics | {"kernel_norm": jnp.float32(t)}

    mesh = train.make_mesh(fsdp=4, devices=jax.devices()[:4])
    rules = (("kernel", train.shard(0, "fsdp")),)
    go([toys.classifier(num_steps=10, step=step)], tmp_path, mesh=mesh, rules=rules)
    assert toys.logged(tmp_path, "kernel_norm") == [4.5]


def test_stages_are_found_by_number_beyond_a_hundred(tmp_path):
    go([counter(name="a-b", num_steps=1)], tmp_path)
    folder = tmp_path / "stages/00-a-b"
    shutil.copytree(folder, tmp_path / "stages/100-c")
    shutil.copytree(folder, tmp_path / "stages/20-d")
    assert list(train.finished_stages(tmp_path)) == ["a-b", "d", "c"]


def test_data_that_no_stage_uses_any_more_leave_the_device():
    residents = Residents(ONE)
    sources = [data.MemorySource(data.from_arrays(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4)), 2) for _ in "ab"]
    first = residents(sources[0])
    residents.next_stage()
    assert residents(sources[0]) is first
    residents(sources[1])
    residents.next_stage()
    residents(sources[1])
    residents.next_stage()
    assert residents(sources[0]) is not first
