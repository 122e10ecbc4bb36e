"""Micro-batches, rematerialization and averages: the same numbers, or those worked out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from jax.ad_checkpoint import checkpoint_name

from jkd import data, nn, train
from jkd.errors import UserError
from jkd.train import loop
from jkd.train.collectives import collectives
from jkd.train.hlo import Program
from jkd.train.remat import rematerialized

MODEL = nn.mlp(4, hidden=(32,), dtype=jnp.float64, param_dtype=jnp.float64)
CONV = nn.cnn(4, width=4)


def loss_fn(params, state, consts, batch, key, t):
    out, model_state = nn.apply_train(MODEL.apply, params, state.model_state, batch["image"])
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"]).mean()
    return loss, train.Aux({"noise": batch["noise"].mean()}, model_state)


def view(key, consts, batch):
    noise = 0.1 * jax.random.normal(key, batch["image"].shape, jnp.float64)
    return {**batch, "image": batch["image"] / 255.0 + noise, "noise": noise}


def init(key, previous, consts):
    return train.create_state(nn.init(MODEL, key, (4, 4, 1)), toys.OPTIMIZER)


def model_stage(num_steps: int = 30, **changes) -> train.Stage:
    fields = {"init": init, "step": train.ModelStep(loss_fn, toys.OPTIMIZER, view), "evaluators": {}}
    return toys.classifier("model", num_steps, **(fields | changes))


def trained(stage, workdir, devices=8):
    """The published leaves and the logged losses of a stage, in float64."""
    with toys.x64():
        toys.go([stage], workdir, mesh=train.make_mesh(devices=jax.devices()[:devices]))
        found = toys.final(workdir, stage.name)
    return found, np.array([toys.logged(workdir, name) for name in ("loss", "grad_norm", "noise")])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(model_stage(), tmp_path_factory.mktemp("plain") / "run")


def same(found, wanted):
    assert found[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(found[0][name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "devices"),
    [
        (lambda stage: train.microbatch(stage, 2), 8),
        (lambda stage: train.microbatch(stage, 16), 1),
        (train.remat, 8),
        (lambda stage: train.remat(stage, ()), 1),
        (lambda stage: train.remat(train.microbatch(stage, 4)), 4),
    ],
)
def test_the_step_is_the_same(change, devices, plain, tmp_path):
    same(trained(change(model_stage()), tmp_path / "run", devices), plain)


def test_ensembles_of_changed_stages_are_their_members(tmp_path):
    keys = jax.random.split(jax.random.key(3), 2)
    stage = train.average(train.remat(train.microbatch(model_stage(8), 2)), "mean", start=2)
    found = trained(train.ensemble(stage, keys), tmp_path / "both", 1)[0]
    for k in range(2):
        alone = trained(dataclasses.replace(stage, key=keys[k]), tmp_path / f"{k}", 1)[0]
        for name, value in alone.items():
            np.testing.assert_allclose(found[name][k], value, rtol=1e-9, err_msg=name)


# --- micro-batches ---


@functools.partial(jax.jit, static_argnums=0)
def gradient(parts, images, labels):
    def loss(params, batch, key):
        out, state = nn.apply_train(CONV.apply, params, model_state, batch["image"])
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"]).mean()
        return loss, train.Aux({"key": jax.random.uniform(key)}, state | {"count": batch["label"][0]})

    params, model_state = nn.split(nn.init(CONV, jax.random.key(0), (4, 4, 1)))
    made = train.value_and_grad(loss, microbatches=parts)
    return made(params, {"image": images, "label": labels}, jax.random.key(1))


def test_running_statistics_move_once_by_the_mean_of_the_parts():
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    (_, aux), _ = gradient(2, images, jnp.arange(8) % 4)
    parts = [gradient(1, images[i::2], jnp.arange(8)[i::2] % 4)[0][1] for i in range(2)]
    stats = [jax.tree.leaves(aux.model_state["batch_stats"]) for aux in (aux, *parts)]
    for both, first, second in zip(*stats, strict=True):
        np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-5, atol=1e-7)
    assert int(aux.model_state["count"]) == 1, "integers are those of the last part, which begins with example 1"
    keys = [jax.random.uniform(jax.random.fold_in(jax.random.key(1), i)) for i in range(2)]
    np.testing.assert_allclose(aux.metrics["key"], np.mean(keys), rtol=1e-6)


def test_every_device_has_its_share_of_each_part():
    mesh = train.make_mesh()
    step = train.make_train_step(lambda p, b, k: ((b["x"] @ p) ** 2).mean(), optax.sgd(0.1), microbatches=4)
    state = jax.eval_shape(lambda: train.create_state({"params": jnp.zeros((24, 24))}, optax.sgd(0.1)))
    batch = {"x": jax.ShapeDtypeStruct((64, 24), jnp.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    text = train.jit_step(step, mesh).lower(state, batch, key).compile().as_text()
    found = collectives(Program(text))
    assert {one.kind for one in found} == {"all-reduce"}, "no example moves to another device"


def test_uneven_parts_are_refused():
    with pytest.raises(UserError, match="A batch of 9 examples cannot be split into microbatches=2 equal parts"):
        gradient(2, jnp.zeros((9, 4, 4, 1)), jnp.zeros(9, int))
    with pytest.raises(UserError, match="microbatches must be >= 1, got 0"):
        train.microbatch(model_stage(), 0)


# --- rematerialization ---


def residuals(saved):
    """The shapes that the backward pass of a convolutional net reads besides parameters and images."""
    params, model_state = nn.split(nn.init(CONV, jax.random.key(0), (8, 8, 1)))
    images = jnp.ones((2, 8, 8, 1))

    def loss(params):
        out, _ = nn.apply_train(CONV.apply, params, model_state, images)
        return (out.logits**2).sum()

    fn = loss if saved is None else rematerialized(loss, saved)
    backward = jax.eval_shape(lambda params: jax.vjp(fn, params)[1], params)
    given = {x.shape for x in jax.tree.leaves(params)} | {images.shape}
    return {x.shape for x in jax.tree.leaves(backward) if x.ndim > 1 and x.shape not in given}


def test_only_named_values_are_kept():
    blocks = {(2, 8, 8, 4), (2, 4, 4, 8), (2, 2, 2, 16)}
    logits = {(2, 4)}
    assert residuals(("block", "logits")) == blocks | logits
    assert residuals(("logits",)) == logits
    assert residuals(()) == set()
    assert residuals(None) > blocks


def test_names_that_no_value_has_are_refused():
    with pytest.raises(UserError, match="no value is named 'blok' or 'logit'. Name what is to be kept by"):
        residuals(("blok", "logit"))


def test_segments_pass_on_all_that_later_ones_read():
    def fn(params, x, key):
        table = {"kept": x * 2, "drawn": jax.random.normal(key, x.shape)}
        for weight in params:
            x = checkpoint_name(jnp.tanh(x * weight + closed), "block")
        return (x + table["drawn"]).sum() + checkpoint_name(table["kept"], "block").sum(), (table, 3.0, params[0])

    closed, args = jnp.float32(0.5), ([jnp.float32(2), jnp.float32(3)], jnp.arange(4.0), jax.random.key(0))
    wanted, got = (jax.value_and_grad(f, (0, 1), has_aux=True)(*args) for f in (fn, rematerialized(fn, ("block",))))
    assert jax.tree.structure(wanted) == jax.tree.structure(got)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    many = jax.jit(jax.vmap(rematerialized(fn, ("block",)), (None, 0, None)))
    np.testing.assert_allclose(many(args[0], args[1][None], args[2])[0][0], wanted[0][0], rtol=1e-6)


def convolutions(stage):
    state = jax.eval_shape(lambda: stage.init(jax.random.key(0), {}, {}))
    batch = {"image": jnp.ones((4, 8, 8, 1)), "label": jnp.zeros(4, int)}
    return str(jax.make_jaxpr(stage.step)(jax.random.key(0), state, {}, batch, 0)).count("conv_general_dilated[")


def conv_stage():
    def loss(params, state, consts, batch, key, t):
        out, model_state = nn.apply_train(CONV.apply, params, state.model_state, batch["image"])
        return (out.logits**2).mean(), train.Aux({}, model_state)

    def init(key, previous, consts):
        return train.create_state(nn.init(CONV, key, (8, 8, 1)), toys.OPTIMIZER)

    return toys.classifier("conv", init=init, step=train.ModelStep(loss, toys.OPTIMIZER))


def test_remat_computes_again():
    stage = conv_stage()
    assert convolutions(train.remat(stage)) > convolutions(stage)


@pytest.mark.parametrize("change", [train.remat, lambda stage: train.microbatch(stage, 2)])
def test_other_steps_are_refused(change):
    with pytest.raises(
        UserError, match="changes a step that is a train.ModelStep; that of stage 'teacher' is a function"
    ):
        change(toys.classifier())
    averaged = train.average(model_stage())
    with pytest.raises(UserError, match="Apply it before train.ensemble and train.average"):
        change(averaged)


# --- averages ---


def counted(kind, tmp_path, **options):
    """x is 0, 1, 3, 6 after steps 0 .. 3."""
    publish = {"publish": lambda state: {"x": state["x"].astype(jnp.bfloat16), "steps": jnp.int32(7)}}
    stage = train.average(toys.counter(num_steps=4, **publish), kind, **options)
    toys.go([stage], tmp_path / "run")
    published = train.load_outcome(tmp_path / "run", "count").published
    assert (published["x"].dtype, int(published["steps"])) == (jnp.bfloat16, 7)
    return float(published["x"])


def test_mean_by_hand(tmp_path):
    assert counted("mean", tmp_path / "all") == 2.5
    assert counted("mean", tmp_path / "late", start=2) == 4.5
    assert counted("mean", tmp_path / "never", start=4) == 6.0


def test_ema_by_hand(tmp_path):
    # Weights of the new value: 1 - 1/10, 1 - 2/11, 1 - 3/12, 1 - max(1 - .25, 4/13 < .25) -> all above 1 - decay.
    a = 0.0
    for x, weight in ((0, 9 / 10), (1, 9 / 11), (3, 0.75), (6, 0.75)):
        a += weight * (x - a)
    assert counted("ema", tmp_path / "warm", decay=0.25) == pytest.approx(a, rel=2**-8)
    assert counted("ema", tmp_path / "late", decay=0.25, start=3) == pytest.approx(3 + 0.9 * 3, rel=2**-8)
    assert counted("ema", tmp_path / "none", decay=0.0) == 6.0


def test_a_stopped_average_goes_on(tmp_path, monkeypatch):
    stage = train.average(toys.counter(num_steps=6), "mean")
    options = dataclasses.replace(toys.QUIET, checkpoint_every=2)
    boundary = loop._StageRun._boundary

    def stop(self):
        boundary(self)
        if self.t == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._StageRun, "_boundary", stop)
        with pytest.raises(KeyboardInterrupt):
            toys.go([stage], tmp_path / "run", options=options)
    assert (tmp_path / "run" / "checkpoints" / "00-count" / "4").exists()
    toys.go([stage], tmp_path / "run", options=options)
    assert float(train.load_outcome(tmp_path / "run", "count").published["x"]) == np.float32(35 / 6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "emma"}, "Unknown average 'emma'. Did you mean 'ema'?"),
        ({"decay": 1.0}, r"decay in \[0, 1\) and start >= 0, got decay=1.0, start=0"),
        ({"start": -1}, "got decay=0.999, start=-1"),
    ],
)
def test_mistakes_in_averages(options, says):
    with pytest.raises(UserError, match=says):
        train.average(toys.counter(), **options)


def test_an_average_evaluates_what_it_publishes(tmp_path):
    stage = train.average(model_stage(20, evaluators={"train": accuracy()}), decay=0.9)
    with toys.x64():
        results = toys.go([stage], tmp_path / "run")
        outcome = train.load_outcome(tmp_path / "run", "model")
        again = train.evaluate_outcome(stage, outcome)
    assert results["model"]["metrics"]["train/accuracy"] == again["train/accuracy"]
    assert again["train/accuracy"] > 0.5


def accuracy():
    def collect(published, consts, batch, mask):
        out = nn.apply_eval(MODEL.apply, published["params"], {}, batch["image"] / 255.0)
        return {"correct": ((out.logits.argmax(-1) == batch["label"]) & mask).sum(), "total": mask.sum()}

    return train.Evaluator(data.MemorySource(toys.DIGITS, 48), collect, toys.finish_correct)
