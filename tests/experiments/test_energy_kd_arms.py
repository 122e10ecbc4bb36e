"""What the arms of Energy KD compute, worked out from the library's losses; and the settings of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import SMOKE

from experiments import arms, cli, distillation, optimizers
from experiments.distillation_setup import Setup
from jkd import distill, nn, train

TEACHER = jnp.array([[8, 0, 0], [2, 1, 0], [0.5, 0.4, 0.3], [4, 3, -1]])
STUDENT = jnp.array([[4, 1, 0], [1, 1, 0], [0, 1, 0], [1, 2, 0.0]])
LABELS = jnp.array([0, 0, 1, 1])
# Temperatures 6, 4, 2, 4 by hand.
CONSTS = {"thresholds": {"teacher": {"low": jnp.float32(-6.902), "high": jnp.float32(-5.477)}}}
TEACHERS = {"teacher": TEACHER}
RULE, REVERSED = jnp.array([6.0, 4, 2, 4]), jnp.array([2.0, 4, 6, 4])
CE = float(distill.cross_entropy(STUDENT, LABELS))
LATE = 10**6


def arm(name, *, weights=None, **changes):
    config = cli.load_config("configs/energy_kd.py").arms[name]
    config.weights.update(weights or {})
    config.update(changes)
    return config


def kd(temperature):
    return float(distill.kd_loss(STUDENT, TEACHER, temperature))


def dkd(temperature, **weights):
    return float(distill.dkd_loss(STUDENT, TEACHER, LABELS, temperature, **weights))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (arm("ce"), CE),
        (arm("kd"), 0.1 * CE + 0.9 * 0.849383),
        (arm("kd", weights={"ce": 0.3, "kd": 2.0}, temperature=1.0), 0.3 * CE + 2 * kd(1.0)),
        (arm("energy_kd"), 0.1 * CE + 0.9 * 0.948700),
        (arm("energy_kd", weights={"ce": 0.3, "kd": 2.0}), 0.3 * CE + 2 * 0.948700),
        (arm("energy_kd", t_mid=4.5), 0.1 * CE + 0.9 * kd(jnp.array([6, 4.5, 2, 4.5]))),
        (arm("energy_kd_reversed"), 0.1 * CE + 0.9 * kd(REVERSED)),
        (arm("dkd"), CE + dkd(4.0, alpha=1.0, beta=8.0)),
        (arm("dkd", alpha=0.5, beta=2.0, temperature=3.0), CE + dkd(3.0, alpha=0.5, beta=2.0)),
        (arm("energy_dkd"), CE + dkd(RULE, alpha=1.0, beta=8.0)),
        (arm("energy_dkd", alpha=0.5, beta=2.0), CE + dkd(RULE, alpha=0.5, beta=2.0)),
    ],
)
def test_losses_of_the_arms(made, expected):
    loss = arms.objective(made, steps_per_epoch=10.0)
    assert float(loss(STUDENT, TEACHERS, LABELS, CONSTS, LATE)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "temperature"), [("dkd", 4.0), ("energy_dkd", RULE)])
def test_decoupled_distillation_warms_up_by_whole_epochs(name, temperature):
    loss = arms.objective(arm(name), steps_per_epoch=2.5)
    soft = dkd(temperature, alpha=1.0, beta=8.0)
    scales = {0: 1 / 20, 2: 1 / 20, 3: 2 / 20, 47: 19 / 20, 48: 1.0, 1000: 1.0}
    for t, scale in scales.items():
        np.testing.assert_allclose(loss(STUDENT, TEACHERS, LABELS, CONSTS, t), CE + scale * soft, rtol=1e-5)


def test_shares_and_temperatures_of_a_batch():
    found = arms.group_shares(arm("energy_kd"), TEACHERS, CONSTS)
    assert {name: float(value) for name, value in found.items()} == {
        "share_low": 0.25,
        "share_high": 0.25,
        "temperature": 4.0,
    }
    found = arms.group_shares(arm("energy_dkd", t_high=7.0), TEACHERS, CONSTS)
    assert float(found["temperature"]) == 4.25
    assert set(arms.group_shares(arm("kd_he_da"), TEACHERS, CONSTS)) == {"share_low", "share_high"}
    assert arms.group_shares(arm("kd"), TEACHERS, {}) == {}


# --- what is mixed ---

IMAGES = jnp.broadcast_to(jnp.arange(1.0, 9)[:, None, None, None], (8, 6, 6, 1))
# Examples 3 and 6 (pixels 4 and 7) are above the threshold.
LOGITS = jnp.where(jnp.isin(jnp.arange(8), jnp.array([2, 5]))[:, None], 0.0, 5.0) * jnp.ones((8, 3))
LIMITS = {"thresholds": {"teacher": {"low": jnp.float32(-100), "high": distill.energy_score(LOGITS)[2] - 0.1}}}


@pytest.mark.parametrize("mixer", ["cutmix", "mixup"])
def test_only_uncertain_images_are_mixed_with_each_other(mixer):
    made = arm("kd_he_da", mixer=mixer, high_rate=0.25)
    seen = set()
    for seed in range(8):
        mixed, weights = arms.mix(made, jax.random.key(seed), {"image": IMAGES}, {"teacher": LOGITS}, LIMITS)
        assert mixed.shape == (3, 6, 6, 1)  # ceil(1.5 * .25 * 8)
        assert weights.tolist() == [1, 1, 0]
        pixels = np.asarray(mixed[:2])
        assert ((pixels >= 3 - 1e-5) & (pixels <= 6 + 1e-5)).all()
        seen |= set(np.round(pixels, 4).ravel().tolist())
    assert len(seen) > 1
    assert (len(seen) > 2) == (mixer == "mixup")  # CutMix moves pixels, MixUp makes new ones


def test_all_images_are_mixed():
    made, orders = arm("kd_cutmix"), set()
    for seed in range(8):
        mixed, weights = arms.mix(made, jax.random.key(seed), {"image": IMAGES}, {"teacher": LOGITS}, LIMITS)
        assert mixed.shape == IMAGES.shape
        assert weights.tolist() == [1] * 8
        pixels = np.asarray(mixed).reshape(8, -1)
        assert all(len(np.unique(row)) <= 2 for row in pixels)
        orders |= {tuple(row) for row in pixels}
    assert len(orders) > 8


@pytest.mark.parametrize("name", ["kd_he_da", "kd_cutmix"])
def test_neighbours_are_mixed_and_no_image_travels(name):
    made = arm(name, mix_group=4, high_rate=1.0)
    many = jnp.arange(1.0, 65)[:, None, None, None] * jnp.ones((64, 6, 6, 1))
    logits = {"teacher": jnp.zeros((64, 3))}
    limits = {"thresholds": {"teacher": {"low": jnp.float32(-100), "high": jnp.float32(-50)}}}
    mix = jax.jit(lambda key, image, logits: arms.mix(made, key, {"image": image}, logits, limits))
    mixed, weights = mix(jax.random.key(0), many, logits)
    assert weights.tolist() == [1] * 64
    own = (np.asarray(mixed).reshape(16, -1) - 1) // 4  # the group that a pixel comes from
    np.testing.assert_array_equal(own, np.arange(16)[:, None] * np.ones_like(own))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.P("data"))
    spread = jax.device_put((many, logits), over)
    program = mix.lower(jax.random.key(0), *spread).compile()
    again, _ = program(jax.random.key(0), *spread)
    np.testing.assert_array_equal(again, mixed)
    assert again.sharding.is_equivalent_to(over, 4)
    collectives = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    assert [line for line in program.as_text().splitlines() if any(f" {one}(" in line for one in collectives)] == []


# --- what a step sees ---


@pytest.fixture(scope="module")
def setup():
    """The smoke config with shifted views and images of 8x8."""
    return Setup.of(cli.load_config(SMOKE, {"data.weak.shift": 1}))


@pytest.fixture(scope="module")
def teacher(setup):
    return nn.init(setup.teachers["teacher"], jax.random.key(5), setup.task.shape)


@pytest.fixture(scope="module")
def batch(setup):
    return setup.task.source({"rows": {"train": np.arange(40)}, "order": 0}, 16).batch(0)


def test_student_and_teacher_see_the_same_view(setup, teacher, batch):
    consts, made = {"teachers": {"teacher": teacher}}, arm("kd")
    seen = distillation.view(setup, made, jax.random.key(1), consts, batch)
    images, logits = seen["image"], distillation.teacher_logits(setup, made, consts, seen)["teacher"]
    plain = setup.views["weak"].plain(batch["image"])
    assert np.abs(np.asarray(images - plain)).max() > 0.5  # it was moved
    np.testing.assert_allclose(logits, setup.teach("teacher", teacher, images), rtol=1e-6)
    assert np.abs(np.asarray(logits - setup.teach("teacher", teacher, plain))).max() > 1e-3


def test_thresholds_are_those_of_augmented_views_in_training_batches(setup, teacher, batch):
    energies, calls = setup.energies["teacher", "weak"], []
    key = jax.random.key(2)

    def sweep(fn, args, source, key):
        calls.append((fn, args, source, key))
        return np.arange(10.0)

    made = arm("energy_kd", low_rate=0.3, high_rate=0.2)
    consts = {"teachers": {"teacher": teacher}, "rows": {"train": np.arange(40)}, "order": 7}
    found = arms.find_thresholds(setup, made, consts, key, sweep)
    assert {name: float(value) for name, value in found["thresholds"]["teacher"].items()} == {"low": 3.0, "high": 7.0}
    ((fn, args, source, swept),) = calls
    assert (fn, args, swept) == (energies, teacher, key)
    assert (source.batch_size, source.seed) == (setup.config.batch_size, 7)
    found = energies(teacher, batch, key)
    moved = setup.views["weak"].train(key, batch["image"])
    np.testing.assert_allclose(found, distill.energy_score(setup.teach("teacher", teacher, moved)), rtol=1e-6)
    plain = distill.energy_score(setup.teach("teacher", teacher, setup.views["weak"].plain(batch["image"])))
    assert np.abs(np.asarray(found - plain)).max() > 1e-3


def test_thresholds_are_those_of_the_logits_that_an_arm_sees(setup, teacher, batch):
    made = arm("energy_kd", prune_rate=0.5, teacher_weight=0.6)
    pruned = distillation.pruned(teacher, 0.5)
    consts = {"teachers": {"teacher": teacher}, "pruned": {"teacher": pruned}, "rows": {"train": np.arange(40)}}
    swept = []

    def sweep(fn, args, source, key):
        swept.append(fn(args, batch, key))
        return np.asarray(swept[0])

    arms.find_thresholds(setup, made, consts | {"order": 7}, jax.random.key(2), sweep)
    images = setup.views["weak"].train(jax.random.key(2), batch["image"])
    mixed = 0.6 * setup.teach("teacher", teacher, images) + 0.4 * setup.teach("teacher", pruned, images)
    np.testing.assert_allclose(swept[0], distill.energy_score(mixed), rtol=1e-5)


@pytest.mark.parametrize(("name", "weight"), [("kd_he_da", 0.9), ("kd_cutmix", 0.9), ("kd_he_da", 2.0)])
def test_a_step_adds_the_distillation_of_the_mixed_images(name, weight, setup, teacher, batch, monkeypatch):
    made = arm(name, weights={"kd": weight}, temperature=3.0)
    count = 3 if name == "kd_he_da" else 4  # the uncertain ones have a capacity
    mixed, weights = setup.views["weak"].plain(batch["image"][::-1][:4]), (jnp.arange(4) < count).astype(jnp.float32)
    monkeypatch.setattr(arms, "mix", lambda *args: (mixed, weights))
    optimizer = optimizers.make_optimizer(setup.config.student, 0.1, 10, 5.0)
    state = train.create_state(nn.init(setup.network, jax.random.key(6), setup.task.shape), optimizer)
    limits = {"low": jnp.float32(-9), "high": jnp.float32(-5)}
    consts = {"teachers": {"teacher": teacher}, "thresholds": {"teacher": limits}}
    key = jax.random.key(3)
    _, metrics = jax.jit(arms.student_step(setup, made, optimizer, 5.0))(key, state, consts, batch, 0)
    images = distillation.view(setup, made, jax.random.split(key)[0], consts, batch)["image"]
    logits = setup.teach("teacher", teacher, images)
    own, again = (setup.student.apply(state.variables, x).logits for x in (images, mixed))
    expected = 0.1 * distill.cross_entropy(own, batch["label"]) + weight * distill.kd_loss(own, logits, 3.0)
    expected += weight * distill.kd_loss(again[:count], setup.teach("teacher", teacher, mixed)[:count], 3.0)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


# --- the settings of the papers ---


def trained(weight_decay, **teacher):
    both = {"momentum": 0.9, "weight_decay": weight_decay, "schedule": "steps"}
    settings = {f"{who}.{name}": value for who in ("teacher", "student") for name, value in both.items()}
    return settings | {f"teacher.{name}": value for name, value in teacher.items()}


CIFAR = {
    "batch_size": 64,
    "data.mean": (0.5071, 0.4867, 0.4408),
    "data.std": (0.2675, 0.2565, 0.2761),
    "data.weak.pad_crop": 4,
    "data.weak.flip": True,
    "data.weak.shift": 0,
    "data.imbalance": 1.0,
    "teacher.model": "resnet56",
    "student.model": "resnet20",
    **trained(lr=0.05, epochs=240.0, milestones=(150, 180, 210), weight_decay=5e-4),
    **{f"arms.{a}.lr": 0.05 for a in ("ce", "kd", "energy_kd", "energy_kd_reversed_long", "dkd", "kd_he_da")},
    **{f"arms.{a}.epochs": 240.0 for a in ("ce", "kd", "energy_kd", "dkd", "energy_dkd", "kd_he_da", "kd_cutmix")},
    **{f"arms.{a}.milestones": (150, 180, 210) for a in ("ce", "kd", "dkd", "kd_he_da")},
    **{f"arms.{a}_long.epochs": 360.0 for a in ("kd", "energy_kd", "energy_kd_reversed", "dkd", "energy_dkd")},
    **{f"arms.{a}_long.milestones": (150, 180, 210, 240, 270, 300) for a in ("kd", "energy_kd", "energy_dkd")},
    **{
        f"arms.{a}.{n}": v
        for a in ("kd", "energy_kd_long", "kd_he_da")
        for n, v in (("weights.ce", 0.1), ("weights.kd", 0.9))
    },
    **{f"arms.{a}.temperature": 4.0 for a in ("kd", "dkd", "kd_he_da", "kd_cutmix", "kd_long")},
    **{f"arms.energy_kd_long.{n}": v for n, v in (("t_low", 2.0), ("t_mid", 4.0), ("t_high", 6.0))},
    **{f"arms.energy_kd_reversed_long.{n}": v for n, v in (("t_low", 6.0), ("t_mid", 4.0), ("t_high", 2.0))},
    **{f"arms.energy_kd_long.{n}": 0.3 for n in ("low_rate", "high_rate")},
    **{f"arms.energy_dkd_long.{n}": 0.1 for n in ("low_rate", "high_rate")},
    "arms.kd_he_da.low_rate": 0.0,
    "arms.kd_he_da.high_rate": 0.4,
    "arms.kd_he_da.mix": "high_energy",
    "arms.kd_cutmix.mix": "all",
    **{
        f"arms.{a}.{n}": v
        for a in ("dkd", "energy_dkd_long")
        for n, v in (("alpha", 1.0), ("beta", 2.0), ("warmup_epochs", 20.0))
    },
}
IMAGENET = {
    "batch_size": 512,
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "data.image_size": 224,
    "data.weak.flip": True,
    "teacher.model": "resnet34",
    "student.model": "resnet18",
    **trained(lr=0.2, epochs=100.0, milestones=(30, 60, 90), weight_decay=1e-4),
    **{f"arms.{a}.{n}": v for a in ("kd", "energy_kd", "dkd") for n, v in (("lr", 0.2), ("epochs", 100.0))},
    **{f"arms.{a}.milestones": (30, 60, 90) for a in ("kd", "energy_kd", "dkd", "kd_he_da")},
    **{f"arms.{a}.{n}": 0.5 for a in ("kd", "energy_kd", "kd_he_da") for n in ("weights.ce", "weights.kd")},
    **{f"arms.{a}.temperature": 1.0 for a in ("kd", "dkd", "kd_he_da", "kd_cutmix")},
    **{f"arms.energy_kd.{n}": 0.2 for n in ("low_rate", "high_rate")},
    **{f"arms.dkd.{n}": v for n, v in (("alpha", 1.0), ("beta", 0.5), ("warmup_epochs", 1.0))},
}


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("cifar100", CIFAR), ("cifar100_lt", {**CIFAR, "data.imbalance": 100.0}), ("imagenet", IMAGENET)],
)
def test_settings_of_the_papers(variant, settings):
    config = cli.flatten(cli.load_config(f"configs/energy_kd.py:{variant}").to_dict())
    assert {name: config[name] for name in settings} == settings


def rates(config, lr, steps, per_epoch, at):
    """The learning rates of a section's optimizer at some steps, as they move a parameter."""
    section = config.copy_and_resolve_references()
    section.momentum, section.weight_decay = 0.0, 0.0
    optimizer = optimizers.make_optimizer(section, lr, steps, per_epoch)
    state = optimizer.init(jnp.zeros(()))
    found = {}
    for t in range(max(at) + 1):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        if t in at:
            found[t] = -float(update)
    return found


def test_the_rate_drops_with_the_epoch_after_each_milestone():
    config = cli.load_config("configs/energy_kd.py:imagenet").teacher
    # Half a step an epoch: epoch 31 begins with step 15.
    found = rates(config, 0.2, 50, 0.5, (0, 14, 15, 29, 30, 44, 45, 49))
    expected = {0: 0.2, 14: 0.2, 15: 0.02, 29: 0.02, 30: 0.002, 44: 0.002, 45: 0.0002, 49: 0.0002}
    assert found == pytest.approx(expected, rel=1e-5)


def test_decay_comes_before_momentum():
    config = cli.load_config("configs/energy_kd.py").teacher
    config.weight_decay = 0.5
    optimizer = optimizers.make_optimizer(config, 0.1, 10**9, 1.0)
    params, state = jnp.array(2.0), optimizer.init(jnp.array(2.0))
    moved = []
    for _ in range(2):
        update, state = optimizer.update(jnp.array(3.0), state, params)
        moved.append(float(update))
    # g = 3 + .5 * 2 = 4: first .1 * 4, then .1 * (4 + .9 * 4).
    assert moved == pytest.approx([-0.4, -0.76])
