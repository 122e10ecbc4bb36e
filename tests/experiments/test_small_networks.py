"""Pruned, evolved and low-bit networks: the shipped smoke runs, what their stages hand on, and how they refuse."""

import itertools

import jax
import numpy as np
import pytest
from helpers_experiments import QUIET, published
from safetensors.numpy import load_file

from experiments import (
    cli,
    evaluate,
    export,
    knowledge_evolution,
    learnable_levels,
    lottery_tickets,
    networks,
    predict,
    quantized_distillation,
)
from experiments import train as command
from experiments.distillation_settings import PAIRS
from experiments.optimizers import schedule
from experiments.studies import run_study
from jkd import nn, prune, quantize, train
from jkd.errors import UserError

METHODS = {
    "lottery_tickets": lottery_tickets,
    "knowledge_evolution": knowledge_evolution,
    "learnable_levels": learnable_levels,
}


def smoke_run(factory, method, *arms, changes=()):
    """The workdir of a method's shipped smoke config, by the command's own main."""
    workdir = factory.mktemp(method)
    only = f"--config.only={','.join(arms)},"
    config = f"configs/{method}.py:smoke"
    command.main(["--config", config, "--workdir", str(workdir), only, *QUIET, *(f"--config.{c}" for c in changes)])
    return workdir


def metrics(workdir, stage):
    return train.load_outcome(workdir, stage).metrics


def kernels(tree):
    return {path: x for path, x in named(tree).items() if path.endswith("kernel")}


def named(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)
    }


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- lottery tickets ---


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    return smoke_run(tmp_path_factory, "lottery_tickets", "dense", "imp_5", "imp_shuffled_5")


def test_a_ticket_that_keeps_all_ends_where_the_whole_network_does(tickets):
    same(published(tickets, "dense"), published(tickets, "whole"))


def test_rounds_prune_more_and_never_less(tickets):
    rounds = ["whole", "global_late_4_5_round1", "global_late_4_5_round2", "imp_5"]
    masks = [train.load_outcome(tickets, name).consts["masks"]["hidden1"]["kernel"] for name in rounds]
    assert [int(mask[0].sum()) for mask in masks] == [
        1024,
        int(1024 * 0.05 ** (1 / 3)),
        int(1024 * 0.05 ** (2 / 3)),
        51,
    ]
    for before, after in itertools.pairwise(masks):
        assert not (after & ~before).any()
    for name, mask in zip(rounds, masks, strict=True):
        assert (published(tickets, name)["params"]["hidden1"]["kernel"][~mask] == 0).all()
    assert metrics(tickets, "imp_5")["weights/zero_prunable"] == pytest.approx([100 * (1 - 51 / 1024)] * 2)


def test_tickets_start_where_they_say(tickets):
    config = cli.load_config("configs/lottery_tickets.py:smoke", {"only": ("imp_5", "init_5", "imp_fresh_5")})
    found = lottery_tickets.Tickets.of(config)
    late = train.load_outcome(tickets, "whole").snapshots[found.late]
    stages = {stage.name: stage for stage in lottery_tickets.stages(config)}
    assert {name: stage.first_step for name, stage in stages.items()} == {
        "whole": 0,
        "global_late_4_5_round1": found.late,
        "global_late_4_5_round2": found.late,
        "imp_5": found.late,
        "init_5": 0,
        "imp_fresh_5": 0,
    }
    whole = train.load_outcome(tickets, "whole")
    masks = train.load_outcome(tickets, "imp_5").consts["masks"]
    keys, consts = stages["whole"].key, {"masks": masks}
    starts = jax.jit(
        lambda keys: {n: stages[n].init(keys, {"whole": whole}, consts) for n in ("imp_5", "init_5", "imp_fresh_5")}
    )(keys)
    mask = masks["hidden1"]["kernel"]
    initial = jax.jit(jax.vmap(found.setup.initialize))(keys)
    for name, wanted in (("imp_5", late["params"]), ("init_5", initial["params"])):
        same(starts[name].params["hidden1"]["kernel"], np.where(mask, wanted["hidden1"]["kernel"], 0))
    counts = {
        name: [int(x[0]) for p, x in named(s.opt_state).items() if p.endswith("count")] for name, s in starts.items()
    }
    assert counts["imp_5"][0] == found.late
    assert counts["init_5"][0] == 0
    fresh = starts["imp_fresh_5"].params["hidden1"]["kernel"]
    assert np.abs(fresh - starts["init_5"].params["hidden1"]["kernel"]).max() > 0.01


def test_shuffled_masks_keep_as_many(tickets):
    found, shuffled = (
        train.load_outcome(tickets, name).consts["masks"]["hidden1"]["kernel"] for name in ("imp_5", "imp_shuffled_5")
    )
    assert found.sum() == shuffled.sum()
    assert (found != shuffled).any()


def test_tickets_transfer(tickets, tmp_path):
    argv = ["--config", "configs/lottery_tickets.py:smoke", "--workdir", str(tmp_path / "run"), *QUIET]
    argv += ["--config.only=late_5,late_2", "--config.arms.late_5.mask=source", "--config.arms.late_5.start=source"]
    argv += ["--config.arms.late_2.mask=source"]
    with pytest.raises(UserError, match="has no zeros in the kernels of this network"):
        command.main([*argv, f"--config.source={tickets}:whole"])
    command.main([*argv[:2], "--workdir", str(tmp_path / "again"), *argv[4:], f"--config.source={tickets}:imp_5"])
    ticket = published(tickets, "imp_5")["params"]["hidden1"]["kernel"]
    for name in ("late_5", "late_2"):
        found = published(tmp_path / "again", name)["params"]["hidden1"]["kernel"]
        np.testing.assert_array_equal(found == 0, ticket == 0)


# --- knowledge evolution ---


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    # Two generations of an arm are enough where no test asks for the third.
    fewer = ("arms.wels.generations=2", "arms.born_again.generations=2")
    return smoke_run(tmp_path_factory, "knowledge_evolution", "kels", "wels", "born_again", "dsd", changes=fewer)


def test_generations_inherit_the_fit_hypothesis(generations):
    config = cli.load_config("configs/knowledge_evolution.py:smoke")
    stages = {stage.name: stage for stage in knowledge_evolution.stages(config)}
    arms = ("born_again", "dsd", "kels", "wels")
    assert set(stages) == {"long", *(f"{arm}{g}" for arm in arms for g in ("_g1", "_g2", ""))}
    assert stages["kels"].step is stages["kels_g1"].step  # one compiled program
    assert stages["long"].num_steps == pytest.approx(3 * stages["kels"].num_steps, abs=1)
    for arm, second in (("kels", "kels_g2"), ("wels", "wels")):
        before = train.load_outcome(generations, f"{arm}_g1")
        masks = train.load_outcome(generations, second).consts["masks"]
        same(masks, before.consts["masks"])
        state = jax.jit(stages[f"{arm}_g2"].init)(stages["long"].key, {f"{arm}_g1": before}, {"masks": masks})
        for path, mask in kernels(masks).items():
            old, new = (kernels(tree)[path] for tree in (before.published["params"], state.params))
            np.testing.assert_array_equal(new[mask], old[mask])
            assert (new[~mask] != old[~mask]).all()
            assert 0.2 < mask.mean() < 0.6
        assert all((x == 0).all() for path, x in named(state.opt_state).items() if "trace" in path)


def test_baselines_of_generations(generations):
    trained = {name: published(generations, name)["params"] for name in ("kels_g1", "born_again_g1", "dsd_g1")}
    same(trained["kels_g1"], trained["born_again_g1"])  # one first generation, whatever follows
    same(trained["kels_g1"], trained["dsd_g1"])
    sparse, dense = (kernels(published(generations, name)["params"]) for name in ("dsd_g2", "dsd"))
    for path, kernel in sparse.items():
        assert (kernel == 0).mean() == 0.5
        assert (dense[path] != 0).mean() > 0.9
    config = cli.load_config("configs/knowledge_evolution.py:smoke")
    made = knowledge_evolution.BornAgain(networks.Setup.of(config), config.arms.born_again)
    first, second = (
        made.consts(g, before, jax.random.key(0))
        for g, before in ((1, None), (2, train.Outcome({"params": 1}, {}, {}, {})))
    )
    assert (float(first["taught"]), float(second["taught"])) == (0, 1)
    assert second["teacher"] == {"params": 1}


def test_the_slim_network_is_measured(generations):
    config = cli.load_config("configs/knowledge_evolution.py:smoke")
    evolution = knowledge_evolution.Evolution(networks.Setup.of(config), config.arms.kels)
    assert evolution.slim.model == nn.MLP(hidden=(8, 8))
    variables = jax.tree.map(lambda x: x[0], published(generations, "kels"))
    slim = prune.extract_slim(variables, evolution.slim.channels)
    assert slim["params"]["hidden2"]["kernel"].shape == (8, 8)
    task = evolution.setup.task
    batch = task.part({"rows": {"test": np.arange(len(task.test))}}, "test", 500).batch(0)
    views = evolution.setup.views["weak"]
    logits = jax.jit(lambda x: evolution.slim.model.apply(slim, views.plain(x)).logits)(batch["image"])
    right = 100 * float((logits.argmax(-1) == batch["label"]).mean())
    assert metrics(generations, "kels")["slim/top1"][0] == pytest.approx(right, abs=0.21)
    ratios = [metrics(generations, name)["magnitude/ratio"] for name in ("kels_g1", "kels_g2")]
    assert (np.asarray(ratios[1]) < 0.7 * np.asarray(ratios[0])).all()


def test_the_published_schedule_of_epochs():
    config = cli.load_config("configs/knowledge_evolution.py:cub200")
    rate = schedule(config.network, round(200 * 187.3125), 187.3125)  # 5,994 birds in batches of 32
    first = [int(np.ceil(epoch * 187.3125)) for epoch in (0, 4, 5, 102, 199)]
    found = [config.arms.kels.lr * float(rate(t)) for t in first]
    np.testing.assert_allclose(found, [0.0512, 0.256, 0.256, 0.129031, 0.0000166112], rtol=2e-3)


# --- learnable levels ---


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    return smoke_run(tmp_path_factory, "learnable_levels", "nearest_2", "ste_fixed_2", "lq_1", "direct_2", "w2a2")


def test_low_bit_stages_hold_levels(levels):
    start = {name: published(levels, "nearest_2")["params"]["hidden1"]["kernel"][name] for name in ("latent", "levels")}
    fixed = published(levels, "ste_fixed_2")["params"]["hidden1"]["kernel"]
    np.testing.assert_array_equal(fixed["levels"], start["levels"])
    assert (fixed["latent"] != start["latent"]).any()
    for stage, bits in (("nearest_2", 2), ("direct_2", 2), ("w2a2", 2), ("lq_1", 1)):
        params = jax.tree.map(lambda x: x[0], published(levels, stage)["params"])
        kernel = np.asarray(jax.jit(quantize.direct())(params)["hidden1"]["kernel"])
        columns = kernel.T if stage == "lq_1" else [kernel.ravel()]
        assert max(len(np.unique(column)) for column in columns) <= 2**bits
    assert (np.asarray(metrics(levels, "direct_2")["choices/changed"]) > 0).all()
    stats = published(levels, "w2a2")["quant_stats"]
    assert list(stats) == ["head"]
    assert (stats["head"]["basis"] != quantize.activation_basis(2)).any()


@pytest.mark.parametrize("stage", ["direct_2", "lq_1", "w2a2"])
def test_low_bit_stages_are_exported_evaluated_and_used(stage, levels, tmp_path, capsys):
    file = tmp_path / "packed.safetensors"
    export.main(["--workdir", str(levels), "--stage", stage, "--format", "packed", "--output", str(file)])
    says = capsys.readouterr().err
    assert "largest difference 0" in " ".join(says.split())
    bits = {name: x.nbytes for name, x in load_file(file).items() if name.endswith("packed")}
    assert bits["params/hidden1/kernel/packed"] == 64 * 16 * int(stage.removeprefix("w")[-1]) / 8
    program = tmp_path / "program"
    export.main(["--workdir", str(levels), "--stage", stage, "--format", "stablehlo", "--output", str(program)])
    assert "read back, it gives the model's outputs" in capsys.readouterr().err
    config = cli.load_run(str(levels), {})
    again = evaluate.evaluate(config, str(levels), [stage])[stage]
    assert all(np.abs(row["difference"]).max() < 1e-4 for row in again.values())
    rows = predict.predict(config, str(levels), stage, "data:test")
    right = 100 * (rows["logits"].argmax(-1) == rows["label"]).mean(axis=-1)
    np.testing.assert_allclose(right, metrics(levels, stage)["test/top1"], atol=0.21)


def test_scaled_channels_leave_the_function_alone():
    config = cli.load_config("configs/learnable_levels.py:channels", {"seeds": 1})
    setup = networks.Setup.of(config)
    variables = setup.initialize(jax.random.key(0))
    large = jax.jit(lambda v: learnable_levels.scaled(v, 6, 30.0))(variables)
    x = jax.random.normal(jax.random.key(1), (5, 8, 8, 1))
    apply = jax.jit(setup.model.apply)
    plain, other = (apply(v, x) for v in (variables, large))
    np.testing.assert_allclose(other.logits, plain.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.features["pool"][:, :6], 30 * plain.features["pool"][:, :6], rtol=1e-4)


# --- compressed students ---


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    return smoke_run(tmp_path_factory, "quantized_distillation", "ce", "energy_kd")


def test_students_are_pruned_low_bit_and_distilled(students, tmp_path):
    kept = []
    for arm in ("ce", "energy_kd"):
        variables = jax.tree.map(lambda x: x[0], published(students, arm))
        mask = np.asarray(variables["masks"]["hidden1"]["kernel"])
        kept.append(mask)
        kernel = np.asarray(jax.jit(quantize.direct())(variables["params"])["hidden1"]["kernel"])
        assert mask.sum() == int(0.1 * mask.size)
        assert len(np.unique(kernel)) <= 4
        assert variables["params"]["head"]["kernel"].shape == (8, 10)
    np.testing.assert_array_equal(*kept)
    assert not np.array_equal(*(published(students, arm)["params"]["head"]["kernel"] for arm in ("ce", "energy_kd")))
    rows = predict.predict(cli.load_run(str(students), {}), str(students), "ce", "data:test")
    right = 100 * (rows["logits"].argmax(-1) == rows["label"]).mean(axis=-1)
    np.testing.assert_allclose(right, metrics(students, "ce")["test/top1"], atol=0.21)
    file = tmp_path / "packed.safetensors"
    export.main(["--workdir", str(students), "--stage", "ce", "--format", "packed", "--output", str(file)])
    export.main(
        ["--workdir", str(students), "--stage", "ce", "--format", "torch", "--output", str(tmp_path / "t.safetensors")]
    )
    sizes = {name: x.nbytes for name, x in load_file(file).items() if name.endswith("hidden1/kernel/packed")}
    assert sizes == {"params/hidden1/kernel/packed": 64 * 8 * 2 / 8, "masks/hidden1/kernel/packed": 64 * 8 / 8}


# --- configs and mistakes ---


def test_published_settings():
    load = cli.load_config
    tickets = load("configs/lottery_tickets.py:imagenet")
    network = tickets.network
    assert (network.epochs, network.lr, network.milestones, network.weight_decay) == (90.0, 0.1, (30, 60), 1e-4)
    assert not networks.is_kernel("block2_0/shortcut/conv/kernel", tickets.exempt)
    assert networks.is_kernel("stem/conv/kernel", tickets.exempt)
    birds = load("configs/knowledge_evolution.py:cub200_vgg11")
    assert (birds.network.model, birds.batch_size, birds.arms.kels.weight_decay) == ("vgg11", 32, 5e-4)
    assert (birds.arms.kels.generations, birds.arms.kels.epochs, birds.network.smoothing) == (5, 200.0, 0.1)
    for method in METHODS:
        for variant in cli._load_module(cli.ROOT / f"configs/{method}.py").VARIANTS:
            config = load(f"configs/{method}.py:{variant}")
            networks.check(config)
            METHODS[method].check(config)
            assert config.network.model in nn.names()
    assert load("configs/quantized_distillation.py:cifar100").teachers.dense.model == PAIRS["cifar100"][1].split("-")[1]


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        (
            "lottery_tickets",
            "arms.imp_5.keep=0.0",
            "arms.imp_5.keep must lie in (0, 1]: the sparsity 1 - keep in [0, 1)",
        ),
        ("lottery_tickets", "arms.imp_5.keep=1.2", "arms.imp_5.keep must lie in (0, 1]"),
        ("lottery_tickets", "arms.imp_5.rounds=1", "arms.imp_5.rounds must be >= 2"),
        ("lottery_tickets", "arms.imp_5.start=lat", "Did you mean 'late'?"),
        ("lottery_tickets", "arms.imp_5.scope=layer", "arms.imp_5.scope"),
        ("lottery_tickets", "late_epoch=9", "late_epoch must be < network.epochs=2.0"),
        ("lottery_tickets", "arms.late_5.mask=source", "set source to WORKDIR:STAGE"),
        ("lottery_tickets", "source=runs", "source must be WORKDIR:STAGE"),
        ("lottery_tickets", "exempt=(,", "exempt"),
        ("lottery_tickets", "only=imp_4,", "Did you mean 'imp_5'"),
        ("knowledge_evolution", "arms.kels.split_rate=1.0", "arms.kels.split_rate must lie in (0, 1), got 1.0"),
        ("knowledge_evolution", "arms.kels.kind=kel", "Did you mean 'kels'?"),
        ("knowledge_evolution", "arms.long.generations=2", "inherit nothing where kind is 'plain'"),
        ("knowledge_evolution", "network.model=shufflenet_v1", "KELS"),
        ("learnable_levels", "arms.direct_2.bits=0", "arms.direct_2.bits must be an integer in 1..8, got 0"),
        ("learnable_levels", "arms.direct_2.bits=9", "arms.direct_2.bits must be an integer in 1..8, got 9"),
        ("learnable_levels", "arms.w2a2.act_bits=9", "arms.w2a2.act_bits must be an integer in 0..8, got 9"),
        ("learnable_levels", "arms.w2a2.act_mode=enery", "Did you mean 'energy'"),
        ("learnable_levels", "arms.direct_2.form=onehit", "Did you mean 'onehot'"),
        ("learnable_levels", "network.optimizer=adm", "Did you mean 'adam'"),
        ("quantized_distillation", "arms.kd.start=teacher", "must be a network like the student"),
        ("quantized_distillation", "arms.kd.start=dnse", "Did you mean 'dense'"),
        ("quantized_distillation", "arms.kd.bits=9", "arms.kd.bits must be an integer in 0..8"),
        ("quantized_distillation", "arms.kd.keep=0.0", "the sparsity 1 - keep in [0, 1)"),
    ],
)
def test_mistakes(method, change, says, refused):
    line = refused(command.main, "--config", f"configs/{method}.py:smoke", "--dry-run", f"--config.{change}")
    assert says in line


class Made(dict):
    """Three seeds of any metric."""

    def __missing__(self, metric):
        return np.random.default_rng(len(metric)).uniform(0.1, 0.9, 3).tolist()


@pytest.mark.parametrize("method", [*METHODS, "quantized_distillation"])
def test_studies_find_what_their_claims_are_about(method):
    module = METHODS.get(method, quantized_distillation)
    for study in module.STUDIES:
        config = cli.load_config(study.config, {"data.blank": True})
        names = [stage.name for stage in module.stages(config)]
        assert set(study.arms) <= set(config.arms)

        def run(cells, names=names):
            return {cell: {"workdir": "w", "stages": {n: {"metrics": Made()} for n in names}} for cell in cells}

        found = run_study(study, run, list(config.get("teachers", ())), list(study.arms or config.arms))
        assert [claim["claim"] for claim in found["claims"]] == [claim.text for claim in study.claims]
        assert set(found["rates"]) == (set(config.arms) if study.rates else set())
