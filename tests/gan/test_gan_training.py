"""The step of two networks: who moves when, lazy penalties, the average; devices, and runs that are stopped."""

import functools
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jkd import data, gan, train
from jkd.errors import UserError
from jkd.train import loop

KEY = jax.random.key(0)
SHAPE = (2, 2, 1)
LATENTS = np.random.default_rng(0).normal(size=(5, 8, 3))
IMAGES = np.random.default_rng(1).normal(size=(5, 8, *SHAPE))


# --- two numbers: by hand ---


def numbers(d=2.0, g=3.0, optimizer=None, **stats):
    variables = ({"params": {"w": jnp.float32(value)}, **stats} for value in (g, d))
    return gan.create_gan_state(*variables, *(2 * (optimizer or optax.sgd(0.1),)))


def duel(**changes):
    """Both play for d * g."""
    fields = {
        "d_loss": lambda params, state, *rest: params["w"] * state.generator.params["w"],
        "g_loss": lambda params, state, *rest: params["w"] * state.discriminator.params["w"],
        "decay": 0.9,
    }
    optimizers = dict.fromkeys(("d_optimizer", "g_optimizer"), optax.sgd(0.1))
    return jax.jit(gan.GanStep(**(fields | optimizers | changes)))


def square(params, state, consts, batch, key, t):
    return gan.Penalty(params["w"] ** 2)


def test_the_discriminator_moves_first():
    state, found = duel()(KEY, numbers(), {}, {}, 0)
    # d = 2 - 0.1 * 3; then g = 3 - 0.1 * 1.7. Were the old d seen, g would be 2.8.
    assert float(state.discriminator.params["w"]) == pytest.approx(1.7)
    assert float(state.generator.params["w"]) == pytest.approx(2.83)
    assert float(state.average["w"]) == pytest.approx(0.9 * 3 + 0.1 * 2.83)
    wanted = {"d_loss": 6.0, "g_loss": 5.1, "d_grad_norm": 3.0, "g_grad_norm": 1.7}
    assert {name: float(x) for name, x in found.items()} == pytest.approx(wanted)


def test_a_lazy_penalty_is_an_update_of_its_own():
    step, state = duel(d_penalty=square, d_every=3), numbers()
    d, g = 2.0, 3.0
    for t in range(5):
        state, found = step(KEY, state, {}, {}, t)
        d -= 0.1 * g
        penalty = 3 * d**2 if t in (0, 3) else 0.0
        d -= 0.1 * 6 * d if t in (0, 3) else 0.0  # behind the loss's update, times 3
        g_loss = g * d
        g -= 0.1 * d
        assert float(found["d_penalty"]) == pytest.approx(penalty, rel=1e-5)
        assert float(found["g_loss"]) == pytest.approx(g_loss, rel=1e-5)
        assert float(state.discriminator.params["w"]) == pytest.approx(d, rel=1e-5)
    assert "g_penalty" not in found


def test_a_penalty_at_every_step_is_part_of_the_loss():
    state, found = duel(g_penalty=square)(KEY, numbers(), {}, {}, 1)
    assert float(state.generator.params["w"]) == pytest.approx(3 - 0.1 * (1.7 + 6))
    assert (float(found["g_loss"]), float(found["g_penalty"])) == pytest.approx((5.1, 9.0))
    assert float(found["g_grad_norm"]) == pytest.approx(7.7)


@pytest.mark.parametrize("every", [1, 2])
def test_penalties_carry_numbers_from_step_to_step(every):
    def penalty(params, state, consts, batch, key, t):
        moved = state.running["path_length"] + 0.5 * (params["w"] - state.running["path_length"])
        return gan.Penalty((params["w"] - moved) ** 2, {"path_length": moved})

    step = duel(g_penalty=penalty, g_every=every, g_optimizer=optax.sgd(0.0), d_penalty=square, d_every=every)
    state, seen = numbers(), []
    for t in range(4):
        state, found = step(KEY, state, {}, {}, t)
        seen.append((float(state.running["path_length"]), float(found["g_penalty"])))
    means = [1.5, 2.25, 2.625, 2.8125] if every == 1 else [1.5, 1.5, 2.25, 2.25]
    due = [every * (3 - mean) ** 2 if t % every == 0 else 0 for t, mean in enumerate(means)]
    assert seen == [pytest.approx(pair) for pair in zip(means, due, strict=True)]
    assert float(state.running["augmentation"]) == 0


def test_other_variables_go_on():
    def counted(who, params, state, consts, batch, key, t):
        value = params["w"] * batch["image"]
        return value, train.Aux({"seen": batch["image"]}, {"stats": getattr(state, who).model_state["stats"] + 1})

    losses = {f"{who[0]}_loss": functools.partial(counted, who) for who in ("discriminator", "generator")}
    view = {"view": lambda key, consts, batch: {"image": batch["image"] * consts["gain"]}}
    start = numbers(stats=jnp.int32(4))
    # A lazy penalty leaves them as they are.
    state, found = duel(**losses, **view, d_penalty=square, d_every=2)(
        KEY, start, {"gain": 2.0}, {"image": jnp.float32(5)}, 0
    )
    assert (int(state.discriminator.model_state["stats"]), int(state.generator.model_state["stats"])) == (5, 5)
    assert (float(found["d_seen"]), float(found["g_seen"])) == (10, 10)
    tree = state.variables
    assert tree["average"] == {"params": state.average, "stats": 5}
    assert tree["generator"]["params"] == state.generator.params
    assert tree["discriminator"] == {"params": state.discriminator.params, "stats": 5}


def test_averages_of_small_floats_are_wide():
    variables = {"params": {"w": jnp.bfloat16(1)}}
    state = gan.create_gan_state(variables, variables, optax.sgd(1.0), optax.sgd(1.0))
    assert state.average["w"].dtype == jnp.float32
    step = duel(d_loss=lambda *args: jnp.float32(0), g_loss=lambda params, *rest: params["w"].astype(jnp.float32))
    assert float(step(KEY, state, {}, {}, 0)[0].average["w"]) == pytest.approx(1 - 0.1 * 0.1, abs=1e-3)


def test_decays_by_half_lives():
    assert gan.average_decay(32, 320.0) ** 10 == pytest.approx(0.5)
    assert gan.average_decay(32, 10_000.0) == pytest.approx(0.99778, abs=1e-5)


@pytest.mark.parametrize("field", ["d_every", "g_every"])
def test_mistakes(field):
    with pytest.raises(UserError, match="d_every and g_every must be at least 1"):
        duel(**{field: 0})
    with pytest.raises(UserError, match="decay"):
        duel(decay=1.5)
    with pytest.raises(UserError, match="every must be at least 1, got 0"):
        gan.lazy_adam(0.1, 0)


# --- Adam ---


def test_lazy_adam_moves_as_far_a_step_as_adam():
    def moved(optimizer, updates):
        params = jnp.ones(2)
        state = optimizer.init(params)
        for grads in updates:
            change, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, change)
        return params, state

    grads = np.random.default_rng(2).normal(size=(6, 2)).astype(np.float32)
    for every in (1, 4):
        c = every / (every + 1) if every > 1 else 1
        wanted, _ = moved(optax.adam(c * 0.02, 0.5**c, 0.99**c, 1e-6), grads)
        found, state = moved(gan.lazy_adam(0.02, every, b1=0.5, eps=1e-6), grads)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert float(state[-1].hyperparams["step_size"]) == pytest.approx(0.02)
    constant = np.ones((5, 2), np.float32)  # 4 steps are 5 updates of 4 / 5
    np.testing.assert_allclose(moved(gan.lazy_adam(0.02, 4), constant)[0], 1 - 4 * 0.02, rtol=1e-5)


# --- networks: the same as a loop in plain optax ---


@functools.cache
def players(dtype="float64"):
    types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return gan.Players(gan.MLPGenerator(SHAPE, (4,), **types), gan.MLPDiscriminator((4,), **types), SHAPE, 3)


def generated(params, batch):
    return players().generate({"params": params}, batch["latent"])[0].images


def judged(params, images):
    return players().judge({"params": params}, images)[0].logits


def d_value(d, g, batch):
    return gan.dual_contrastive_d_loss(judged(d, batch["image"]), judged(d, generated(g, batch)))


def g_value(d, g, batch):
    return gan.dual_contrastive_g_loss(judged(d, batch["image"]), judged(d, generated(g, batch)))


def d_slope(d, batch):
    return gan.r1_penalty(functools.partial(judged, d), batch["image"])


def g_slope(g, batch, mean):
    lengths = jnp.square(generated(g, batch)).sum((1, 2, 3))
    moved = mean + 0.25 * (lengths.mean() - mean)
    return jnp.square(lengths - moved).mean(), moved


def game(d_every, g_every, **changes):
    def g_penalty(params, state, consts, batch, key, t):
        value, moved = g_slope(params, batch, state.running["path_length"])
        return gan.Penalty(value, {"path_length": moved})

    fields = {
        "d_loss": lambda params, state, consts, batch, *rest: d_value(params, state.generator.params, batch),
        "g_loss": lambda params, state, consts, batch, *rest: g_value(state.discriminator.params, params, batch),
        "d_penalty": lambda params, state, consts, batch, *rest: gan.Penalty(d_slope(params, batch)),
        "g_penalty": g_penalty,
        "d_optimizer": gan.lazy_adam(0.01, d_every, b1=0.3),
        "g_optimizer": gan.lazy_adam(0.02, g_every, b1=0.3),
        "decay": 0.8,
    }
    return gan.GanStep(**(fields | {"d_every": d_every, "g_every": g_every} | changes))


def by_hand(d, g, d_every, g_every):
    """Alternating updates, each network by an Adam whose rate and betas are corrected."""

    def adam(lr, every):
        c = every / (every + 1) if every > 1 else 1
        return optax.adam(c * lr, 0.3**c, 0.99**c)

    def update(optimizer, grads, params, state):
        change, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, change), state

    d_adam, g_adam = adam(0.01, d_every), adam(0.02, g_every)
    d_state, g_state, average, mean = d_adam.init(d), g_adam.init(g), g, jnp.float32(0)
    for t in range(5):
        batch = {"latent": jnp.asarray(LATENTS[t]), "image": jnp.asarray(IMAGES[t])}
        grads = jax.grad(d_value)(d, g, batch)
        if d_every == 1:
            grads = jax.tree.map(jnp.add, grads, jax.grad(d_slope)(d, batch))
        d, d_state = update(d_adam, grads, d, d_state)
        if d_every > 1 and t % d_every == 0:
            grads = jax.tree.map(lambda x: d_every * x, jax.grad(d_slope)(d, batch))
            d, d_state = update(d_adam, grads, d, d_state)
        grads = jax.grad(g_value, argnums=1)(d, g, batch)
        extra, moved = jax.grad(g_slope, has_aux=True)(g, batch, mean)
        if g_every == 1:
            grads, mean = jax.tree.map(jnp.add, grads, extra), moved.astype(jnp.float32)
        g, g_state = update(g_adam, grads, g, g_state)
        if g_every > 1 and t % g_every == 0:
            extra, moved = jax.grad(g_slope, has_aux=True)(g, batch, mean)
            g, g_state = update(g_adam, jax.tree.map(lambda x: g_every * x, extra), g, g_state)
            mean = moved.astype(jnp.float32)
        average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, g)
    return d, g, average, mean


@pytest.mark.parametrize(("d_every", "g_every"), [(3, 2), (1, 1)])
def test_steps_are_those_of_a_loop_by_hand(d_every, g_every):
    with jax.enable_x64(True):
        g, d = jax.jit(players().init)(KEY)
        step = game(d_every, g_every)
        state = gan.create_gan_state(g, d, step.g_optimizer, step.d_optimizer)
        traced = []

        @jax.jit
        def once(*args):
            traced.append(args)
            return step(*args)

        for t in range(5):
            state, _ = once(KEY, state, {}, {"latent": LATENTS[t], "image": IMAGES[t]}, jnp.int32(t))
        found = (state.discriminator.params, state.generator.params, state.average, state.running["path_length"])
        wanted = jax.jit(by_hand, static_argnums=(2, 3))(d["params"], g["params"], d_every, g_every)
        chex.assert_trees_all_close(found, wanted, rtol=1e-7, atol=1e-9)
        assert len(traced) == 1, "t decides within the program"
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found[:2], (d["params"], g["params"]))
        assert moved[0]["head"].pop("bias") < 1e-6, "nothing in this loss holds the level of logits"
        assert min(jax.tree.leaves(moved)) > 1e-3
        counts = [int(x.opt_state[0].count) for x in (state.discriminator, state.generator)]
        assert counts == [5 + (5 + k - 1) // k if k > 1 else 5 for k in (d_every, g_every)]


def test_rematerialized_steps_are_the_same():
    with jax.enable_x64(True):
        batch = {"latent": jnp.asarray(LATENTS[0]), "image": jnp.asarray(IMAGES[0])}

        def after(**changes):
            step = game(1, 1, **changes)
            g, d = players().init(KEY)
            return step(KEY, gan.create_gan_state(g, d, step.g_optimizer, step.d_optimizer), {}, batch, 0)

        found = jax.jit(lambda: (after(), after(saved=("block",))))()
        chex.assert_trees_all_close(*found, rtol=1e-9, atol=1e-12)


# --- runs ---

OPTIONS = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=False)


def images(count, side):
    pixels = np.random.default_rng(3).integers(0, 255, (count, side, side, 1), np.uint8)
    return data.from_arrays(pixels, np.zeros(count, np.int32), num_classes=1, name="noise")


def everything(state):
    """All that a step reads, as a plain tree."""
    return {"leaves": jax.tree.leaves(state)}


def contest(networks, dataset, num_steps, every, **options):
    """A stage of two networks that play for the dual contrastive loss, latents drawn from the step's key."""

    def made(params, key, count):
        return networks.generate({"params": params}, networks.latents(key, count), key=key, train=True)[0].images

    def logits(params, images):
        return networks.judge({"params": params}, images)[0].logits

    def d_loss(params, state, consts, batch, key, t):
        fake = made(state.generator.params, key, len(batch["image"]))
        return gan.dual_contrastive_d_loss(logits(params, batch["image"]), logits(params, fake))

    def g_loss(params, state, consts, batch, key, t):
        fake, d = made(params, key, len(batch["image"])), state.discriminator.params
        return gan.dual_contrastive_g_loss(logits(d, batch["image"]), logits(d, fake))

    def d_penalty(params, state, consts, batch, key, t):
        return gan.Penalty(0.1 * gan.r1_penalty(functools.partial(logits, params), batch["image"]))

    def g_penalty(params, state, consts, batch, key, t):
        def g_fn(latents):
            return networks.generate({"params": params}, latents)[0].images

        found = gan.path_length_penalty(g_fn, networks.latents(key, 4), key, state.running["path_length"])
        return gan.Penalty(found.penalty, {"path_length": found.mean})

    adam = gan.lazy_adam(0.01, max(every, 1), eps=1e-4)
    penalties = {"d_penalty": d_penalty, "d_every": every, "g_penalty": g_penalty, "g_every": every}
    step = gan.GanStep(d_loss, g_loss, adam, adam, **(penalties if every else {}), decay=0.9, view=floats)

    def init(key, previous, consts):
        return gan.create_gan_state(*networks.init(key), adam, adam)

    source = data.MemorySource(dataset, 16, seed=3)
    return train.Stage("game", num_steps, init, step, data=lambda consts: source, publish=everything, **options)


def floats(key, consts, batch):
    wide = jax.dtypes.canonicalize_dtype(float)  # in float32 the two programs round images differently
    return {"image": batch["image"].astype(wide) / 127.5 - 1}


def leaves(workdir):
    return [np.asarray(x) for x in train.load_outcome(workdir, "game").published["leaves"]]


def test_eight_devices_play_as_one(tmp_path):
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    critic = gan.StyleGAN2Discriminator(8, channels=1, fmap_base=16, fmap_max=4, **wide)  # in groups of 4: two devices
    networks = gan.Players(gan.MLPGenerator((8, 8, 1), (8,), **wide), critic, (8, 8, 1), 3)
    found = {}
    jax.config.update("jax_enable_x64", True)  # the loop's threads must see it too
    try:
        for devices in (1, 8):
            mesh = train.make_mesh(devices=jax.devices()[:devices])
            stage = contest(networks, images(48, 8), 3, 0)
            named = {"workdir": tmp_path / str(devices), "mesh": mesh, "options": OPTIONS}
            results = train.run([stage], log_every=1, **named)
            found[devices] = leaves(tmp_path / str(devices)), (tmp_path / str(devices) / "metrics.jsonl").read_text()
            assert results["game"]["steps"] == 3
    finally:
        jax.config.update("jax_enable_x64", False)
    for one, eight in zip(found[1][0], found[8][0], strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-9, atol=1e-12)
    losses = [[json.loads(line)["train"] for line in text.splitlines()] for _, text in found.values()]
    assert len(losses[0]) == 3
    for one, eight in zip(*losses, strict=True):
        assert eight == pytest.approx(one, rel=1e-9)


def test_a_stopped_game_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    every, at = 4, 6  # between two penalties
    networks = gan.Players(gan.MLPGenerator(SHAPE, (4,)), gan.MLPDiscriminator((4,)), SHAPE, 3)

    def go(name):
        mesh = train.make_mesh(devices=jax.devices()[:1])
        named = {"workdir": tmp_path / name, "mesh": mesh, "options": OPTIONS}
        train.run([contest(networks, images(48, 2), 10, every)], log_every=1, **named)

    go("whole")
    boundary = loop._StageRun._boundary

    def ask(self):
        if self.t == at:
            monkeypatch.setattr(loop._StageRun, "_boundary", boundary)
            os.kill(os.getpid(), signal.SIGTERM)
        boundary(self)

    monkeypatch.setattr(loop._StageRun, "_boundary", ask)
    with pytest.raises(train.Preempted, match=f"at step {at} of stage 'game'"):
        go("stopped")
    go("stopped")
    whole, stopped = leaves(tmp_path / "whole"), leaves(tmp_path / "stopped")
    assert [(x.dtype, x.tobytes()) for x in stopped] == [(x.dtype, x.tobytes()) for x in whole]
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert texts[0] == texts[1]
    penalties = [json.loads(line)["train"]["d_penalty"] > 0 for line in texts[0].splitlines()]
    assert penalties == [t % every == 0 for t in range(10)]
    assert any(float(x) > 0 for x in whole if x.shape == ()), "the mean path length"
