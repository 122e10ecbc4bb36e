"""Several seeds as one stage equal the single runs, in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jkd import data, train
from jkd.errors import UserError

KEYS = jax.random.split(jax.random.key(7), 2)
OTHER_KEYS = jax.random.split(jax.random.key(8), 2)
MODES = ("vmap", "unroll", "loop")
QUIET = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=False)
SUBSET = 128


@functools.cache
def mesh(count: int = 1):
    return train.make_mesh(devices=jax.devices()[:count])


def go(stages, workdir, count=1):
    return train.run(stages, workdir=workdir, log_every=5, options=QUIET, mesh=mesh(count))


# Each seed trains on its own half of the set, and is evaluated on the other half too.


def draw_split(key, previous, sweep):
    return {"order": np.asarray(jax.random.permutation(key, len(toys.DIGITS)))}


def own_part(consts):
    return data.MemorySource(toys.DIGITS.subset(np.asarray(consts["order"])[:SUBSET]), 16, seed=3)


def left_out(consts):
    return data.MemorySource(toys.DIGITS.subset(np.asarray(consts["order"])[SUBSET:]), 48)


def collect_rows(published, consts, batch, mask):
    return {"index": batch["index"], "logits": toys.logits(published["params"], batch["image"])}


def finish_rows(rows):
    assert len(rows["index"]) == len(toys.DIGITS) - SUBSET
    return {"first": int(rows["index"][0]), "last": int(rows["index"][-1]), "logit": float(rows["logits"].mean())}


def teacher() -> train.Stage:
    evaluators = {
        "all": toys.accuracy(every=6),
        "held": train.Evaluator(left_out, toys.collect_correct, toys.finish_correct),
        "rows": train.Evaluator(left_out, collect_rows, finish_rows, kind="gather"),
    }
    return toys.classifier(num_steps=12, prepare=draw_split, data=own_part, evaluators=evaluators, snapshots=(6,))


def student(name="student") -> train.Stage:
    return toys.student(name, 8, data=lambda consts: data.MemorySource(toys.DIGITS, 16, seed=4))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The stages of each key on their own: results, final arrays and logged losses."""
    runs = []
    for k in range(2):
        workdir = tmp_path_factory.mktemp(f"single-{k}") / "run"
        stages = [replaced(teacher(), KEYS[k]), replaced(student(), OTHER_KEYS[k])]
        runs.append((go(stages, workdir), finals(workdir), toys.logged(workdir, "loss")))
    return runs


def replaced(stage, key):
    return type(stage)(**(vars(stage) | {"key": key}))


def finals(workdir):
    return {name: toys.final(workdir, name) for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def ensembles(tmp_path_factory):
    """The same stages as pairs of ensembles, by mode."""
    runs = {}
    for mode in MODES:
        workdir = tmp_path_factory.mktemp(mode) / "run"
        stages = [train.ensemble(teacher(), KEYS, mode), train.ensemble(student(), OTHER_KEYS, mode)]
        runs[mode] = go(stages, workdir), finals(workdir), toys.logged(workdir, "loss")
    return runs


def test_members_differ(single):
    first, second = (run[1]["teacher"] for run in single)
    for name, value in first.items():
        if "kernel" in name or "order" in name:
            assert not np.array_equal(value, second[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_members_equal_single_runs(mode, name, single, ensembles):
    # The student's consts hold its own teacher: pairs are paired.
    found = ensembles[mode][1][name]
    for k, run in enumerate(single):
        assert found.keys() == run[1][name].keys()
        for path, value in run[1][name].items():
            assert found[path].shape == (2, *value.shape)
            if mode == "loop":
                assert found[path][k].tobytes() == value.tobytes(), path
            else:
                np.testing.assert_allclose(found[path][k], value, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("mode", MODES)
def test_metrics_are_those_of_the_single_runs(mode, single, ensembles):
    results, _, losses = ensembles[mode]
    np.testing.assert_allclose(losses, np.stack([run[2] for run in single], axis=1), rtol=1e-4)
    for stage in ("teacher", "student"):
        metrics = results[stage]["metrics"]
        for name, values in metrics.items():
            wanted = [run[0][stage]["metrics"][name] for run in single]
            np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-5, err_msg=name)
    assert set(results["teacher"]["metrics"]) == {
        "all/accuracy", "held/accuracy", "rows/first", "rows/last", "rows/logit"
    }  # fmt: skip
    for kind in ("last", "max", "min"):
        wanted = [run[0]["teacher"]["history"]["all/accuracy"][kind] for run in single]
        np.testing.assert_allclose(results["teacher"]["history"]["all/accuracy"][kind], wanted, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_teacher_is_shared(mode, tmp_path):
    stages = [replaced(teacher(), KEYS[0]), train.ensemble(student(), OTHER_KEYS, mode)]
    go(stages, tmp_path)
    shared, outcome = train.load_outcome(tmp_path, "teacher"), train.load_outcome(tmp_path, "student")
    assert (shared.members, outcome.members) == (0, 2)
    for k in range(2):
        seen = jax.tree.map(lambda x, k=k: x[k], outcome.consts["teacher"])
        jax.tree.map(np.testing.assert_array_equal, seen, shared.published)


def test_equal_keys_are_equal_members(tmp_path):
    go([train.ensemble(teacher(), jnp.stack([KEYS[0]] * 2))], tmp_path)
    for name, value in toys.final(tmp_path, "teacher").items():
        np.testing.assert_array_equal(value[0], value[1], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_members_of_one_source_see_its_batches(mode, tmp_path):
    def step(key, state, consts, batch, t):
        return state + batch["index"].sum(), {"rows": jnp.float32(batch["index"].shape[0])}

    def init(key, previous, consts):
        return jnp.int32(0)

    stage = toys.classifier(num_steps=5, init=init, step=step, publish=lambda state: state, evaluators={})
    go([train.ensemble(stage, KEYS, mode)], tmp_path, count=8)
    source = data.MemorySource(toys.DIGITS, 16, seed=3)
    total = sum(int(source.local(t)["index"].sum()) for t in range(5))
    np.testing.assert_array_equal(train.load_outcome(tmp_path, "teacher").published, [total, total])
    assert toys.logged(tmp_path, "rows") == [[16, 16]]


@pytest.mark.parametrize("mode", ["vmap", "unroll"])
def test_rounds_of_ensembles_share_the_compiled_step(mode, tmp_path):
    def step(key, state, consts, batch, t):
        return state + 1, {"x": state}

    def init(key, previous, consts):
        return jnp.float32(0)

    def publish(state):
        return state

    rounds = [train.Stage(f"round-{i}", 2, init, step, publish=publish) for i in range(3)]
    with toys.compiled() as names:
        go([train.ensemble(stage, KEYS, mode) for stage in rounds], tmp_path)
    assert names.count("program") == 1


# --- mistakes ---


def test_arguments():
    with pytest.raises(UserError, match="Unknown ensemble mode 'vmapp'. Did you mean 'vmap'"):
        train.ensemble(teacher(), KEYS, "vmapp")
    for keys in (KEYS[0], KEYS[:0]):
        with pytest.raises(UserError, match="takes an array of K >= 1 PRNG keys, got shape"):
            train.ensemble(teacher(), keys)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_members_must_agree(mode, tmp_path):
    first = toys.classifier(num_steps=0, evaluators={})
    keys = jax.random.split(jax.random.key(0), 3)
    stages = [train.ensemble(first, KEYS, mode), train.ensemble(student(), keys, mode)]
    with pytest.raises(UserError, match="An ensemble of 3 needs stage 'teacher', an ensemble of 2; give both the same"):
        go(stages, tmp_path)


def test_a_single_stage_sees_all_members_of_an_ensemble(tmp_path):
    stages = [
        train.ensemble(toys.classifier(num_steps=0, evaluators={}), KEYS),
        toys.classifier(
            "mean",
            0,
            needs=("teacher",),
            evaluators={},
            publish=lambda state: state,
            init=lambda key, previous, consts: previous["teacher"].published["params"]["head"]["kernel"].mean(0),
        ),
    ]
    go(stages, tmp_path)
    kernels = train.load_outcome(tmp_path, "teacher").published["params"]["head"]["kernel"]
    np.testing.assert_allclose(train.load_outcome(tmp_path, "mean").published, kernels.mean(0), rtol=1e-6)


def test_sources_of_members_must_have_one_size(tmp_path):
    def uneven(consts):
        return data.MemorySource(toys.DIGITS.take(32 + int(consts["order"][0])), 16, seed=0)

    stage = toys.classifier(prepare=draw_split, data=uneven, evaluators={})
    with pytest.raises(
        UserError, match="members of an ensemble need sources of one size: .* examples in batches of 16"
    ):
        go([train.ensemble(stage, KEYS)], tmp_path)


def test_looped_members_share_their_compiled_init(tmp_path):
    with toys.compiled() as names:
        go([train.ensemble(toys.classifier(num_steps=2), jax.random.split(jax.random.key(0), 4), "loop")], tmp_path)
    assert (names.count("init"), names.count("program")) == (1, 1)
