"""What a stage may ask of the loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from sklearn.cluster import KMeans
from toys import counter, go

from jkd import data, train

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
