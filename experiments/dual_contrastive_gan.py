"""Generators trained by the dual contrastive loss and with attention, beside other adversarial losses.

Yu et al., Dual Contrastive Loss and Attention for GANs, ICCV 2021. Every arm is a generator and a discriminator of
its own: what differs is the loss, and where either has attention. All are compared by the Frechet distance of the
features of one small network, which is no FID.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import gan_games, gan_measures, gan_networks, gans
from experiments.report import Measure
from experiments.studies import Claim, Study
from jkd import gan, train
from jkd.errors import unknown

predictor = gans.predictor
BASELINE = "logistic"
MEASURE = Measure("test/frechet", "validation/frechet", "Frechet distance of features on test images", lower=True)


def check(config: ConfigDict) -> None:
    """Raises UserError for arms that could not be trained, before any data is read."""
    gans.check(config)
    for name in gans.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        if arm.loss not in gan_games.LOSSES:
            raise unknown(f"{field}.loss", arm.loss, tuple(gan_games.LOSSES))
        if arm.penalty not in ("", *gan_games.PENALTIES):
            raise unknown(f"{field}.penalty", arm.penalty, ("", *gan_games.PENALTIES))
        for part in ("generator", "discriminator"):
            gan_networks.attention_of(arm[f"{part}_attention"], f"{field}.{part}_attention")


def arm_stage(setup: gans.Setup, name: str) -> train.Stage:
    """The stage of one arm."""
    config, arm = setup.config, setup.config.arms[name]
    players, rules = setup.players(arm), config.game.copy_and_resolve_references()
    rules.penalty = arm.penalty or rules.penalty
    rules.penalty_weight = arm.penalty_weight if arm.penalty else rules.penalty_weight
    game = gan_games.Game(players, rules, arm.loss)
    step = gan_games.make_step(setup, game, arm.lr)

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> gan.GanState:
        return gan.create_gan_state(*players.init(key), step.g_optimizer, step.d_optimizer)

    return gans.stage(setup, name, rules.steps, step, init, gan_measures.of_players(setup, players))


def stages(config: ConfigDict) -> list[train.Stage]:
    """The feature network, and one stage for each arm."""
    check(config)
    setup = gans.Setup.of(config)
    return [gans.feature_stage(setup), *(arm_stage(setup, name) for name in gans.selected_arms(config))]


def generator(config: ConfigDict, stage: str) -> gans.Generator:
    """How a stage makes images."""
    return gans.generator(gans.Setup.of(config).players(gans.arm_of(config, stage)))


# --- claims ---


def limits(stages: Mapping[str, Any], factor: float = 1.3) -> dict[str, Any]:
    """The baseline's distance times a factor, as a stage of its own."""
    found = factor * np.asarray(stages[BASELINE]["metrics"][MEASURE.metric], float)
    return {"limit": {"metrics": {MEASURE.metric: found.tolist()}, "history": {}}}


WITHIN = (
    Claim("dual (swapped roles) is within 30 % of logistic", "better, at scale", "dual", "limit"),
    Claim("dual (saturating) is within 30 % of logistic", "better, at scale", "dual_saturating", "limit"),
    Claim("dual (swapped roles) beats logistic", "-17.5 % to -47.5 % FID", "dual", "logistic"),
    Claim("dual (saturating) beats logistic", "-17.5 % to -47.5 % FID", "dual_saturating", "logistic"),
)
ATTENTION = (
    Claim("dual (swapped roles) is within 30 % of logistic", "better, at scale", "dual", "limit"),
    Claim("patchwise attention in the generator helps", "9.84 to 9.35 (CelebA)", "patchwise_g", "logistic"),
    Claim("patchwise beats global attention in the generator", "SAN wins", "patchwise_g", "self_g"),
    Claim("patchwise attention beats dynamic filters", "SAN wins", "patchwise_g", "dynamic_g"),
    Claim("patchwise attention beats tokens", "SAN wins", "patchwise_g", "tokens_g"),
    Claim("dual loss and both attentions beat logistic", "-17.5 % to -47.5 % FID", "dual_attention", "logistic"),
)
SHARED: dict[str, Any] = {"shared": (gans.FEATURES,), "given": "start.workdir", "derived": limits}
CONFIG = "configs/dual_contrastive_gan.py"
STUDIES = (
    Study("digits", CONFIG, (0.001, 0.003, 0.01), 2, WITHIN, **SHARED),
    Study("fashion", f"{CONFIG}:fashion", (0.0005, 0.002), 1, WITHIN, **SHARED),
    Study(
        "patches",
        f"{CONFIG}:patches",
        (0.002,),
        0,
        ATTENTION,
        arms=("logistic", "dual", "self_g", "dynamic_g", "tokens_g", "patchwise_g", "dual_attention"),
        **SHARED,
    ),
)
