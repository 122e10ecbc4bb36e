"""Generators whose images carry a fingerprint of bits that a decoder reads.

Yu, Skripniuk, Chen, Davis and Fritz, Responsible Disclosure of Generative Models Using Scalable Fingerprinting, ICLR
2022. One generator is trained for all fingerprints; an instance with one of them is made afterwards, without training
(`python -m experiments.fingerprints`). An arm is plain (no fingerprint), fingerprinted with some of the loss's terms,
or an instance that somebody else trained on.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import gan_games, gan_measures, gans
from experiments.fingerprint_game import SUB, FingerprintGame, build_decoder, parse_perturbation, perturbed
from experiments.report import Measure
from experiments.studies import Claim, Study
from jkd import gan, metrics, prune, quantize, train
from jkd.errors import UserError, unknown

predictor = gans.predictor
BASELINE = "plain"
MEASURE = Measure("test/frechet", "validation/frechet", "Frechet distance of features on test images", lower=True)
REGISTRY_SEED = 11  # of the users that images are attributed to
KINDS = ("plain", "fingerprint", "finetuned")
WEIGHTS = {"quantized": ("8", "4"), "pruned": ("0.2", "0.5")}  # what is done to an instance's weights


def check(config: ConfigDict) -> None:
    """Raises UserError for arms that could not be trained, before any data is read."""
    gans.check(config)
    cls.check_numbers(config, "", positive=("users",))
    if not 0 < config.false_positive_rate <= 1:
        raise UserError(f"false_positive_rate must lie in (0, 1], got {config.false_positive_rate}.")
    for spec in config.perturbations:
        parse_perturbation(spec, "perturbations")
    for name in gans.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        if arm.kind not in KINDS:
            raise unknown(f"{field}.kind", arm.kind, KINDS)
        if arm.bits < 1 or len(arm.weights) != 4:
            raise UserError(f"{field} needs bits >= 1 and four weights, got {arm.bits} and {tuple(arm.weights)}.")
        for spec in arm.immunize:
            parse_perturbation(spec, f"{field}.immunize")
        if arm.kind == "finetuned" and (arm.start not in config.arms or config.arms[arm.start].kind != "fingerprint"):
            raise unknown(f"{field}.start", arm.start, [n for n in config.arms if config.arms[n].kind == "fingerprint"])


def registry_of(users: int, bits: int) -> jax.Array:
    """The fingerprints of the users that images are attributed to."""
    return gan.sample_fingerprints(jax.random.key(REGISTRY_SEED), users, bits)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """How well fingerprints are read from images of one game.

    Attributes:
      setup: of the config.
      game: whose images, and whose decoder.
    """

    setup: gans.Setup
    game: FingerprintGame

    def images(self, params: Any, index: jax.Array, bits: jax.Array) -> jax.Array:
        """Images of the latents that every generator is judged by, with these bits."""
        latents = gan_measures.latents_of(index, self.game.players.latent_dim)
        return self.game.players.generate({"params": params}, latents, bits)[0].images

    def sample(self, published: Any, consts: Any, index: jax.Array) -> jax.Array:
        """Images of the averaged generator, each with a user's fingerprint."""
        config = self.setup.config
        registry = registry_of(config.users, self.game.bits)
        return self.images(published["average"]["params"][SUB], index, registry[index % config.users])

    def evaluator(self, every: int = 0) -> train.Evaluator:
        """Bits read right, as released and after perturbations; users found; false alarms on real images."""
        assert self.game.decoder is not None
        setup, game, config, read = self.setup, self.game, self.setup.config, self.game.decoder.read
        registry, rate = registry_of(config.users, game.bits), config.false_positive_rate
        views = {spec: parse_perturbation(spec, "perturbations") for spec in config.perturbations}

        def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
            params, decoder = published["average"]["params"][SUB], published["generator"]["params"]["decoder"]
            index = batch["index"]
            user = index % config.users
            bits = registry[user]

            def logits(images: jax.Array) -> jax.Array:
                return read(decoder, images)[1]

            def total(rows: jax.Array) -> jax.Array:
                return jnp.where(mask, rows, 0).sum()

            def right(images: jax.Array) -> jax.Array:
                return total(metrics.bit_accuracy(logits(images), bits))

            made = self.images(params, index, bits)
            released = gan.from_uint8(gan.as_uint8(made))
            found = gan.attribute(logits(released), registry)
            sure = gan.attribute(logits(released), registry, false_positive_rate=rate)
            real = gan.from_uint8(setup.plain(batch["image"]))
            alarms = gan.attribute(logits(real), registry, false_positive_rate=rate)
            twins = self.images(params, index, registry[(user + 1) % config.users])
            key = jax.random.key(0)
            sums = {spec: right(perturbed(key, released, *view)) for spec, view in views.items()}
            sums |= {name: right(self.images(weights, index, bits)) for name, weights in altered(params).items()}
            return {
                **sums,
                "accuracy": right(made),
                "uint8": right(released),
                "attributed": total(found.user == user),
                "detected": total(sure.user == user),
                "false_alarms": total(alarms.user >= 0),
                "real": total(metrics.bit_accuracy(logits(real), jnp.broadcast_to(registry[:1], bits.shape))),
                "change": total(jnp.square(made - twins).mean((1, 2, 3))),
                "images": mask.sum(),
            }

        def finish(sums: Any) -> dict[str, float]:
            return {name: float(value / sums["images"]) for name, value in sums.items() if name != "images"}

        return train.Evaluator(setup.part("test"), collect, finish, every=every)


def altered(params: Any) -> dict[str, Any]:
    """A generator's parameters with kernels of few bits, or with the smallest ones set to 0."""
    found = {}
    for bits in map(int, WEIGHTS["quantized"]):
        found[f"quantized:{bits}"] = quantize.direct()(quantize.quantize_params(params, bits, rules=(), form="latent"))
    for share in map(float, WEIGHTS["pruned"]):
        ones = prune.ones_masks(params, prune.is_kernel)
        masks = prune.global_magnitude_mask(params, ones, 1 - share)
        found[f"pruned:{share:g}"] = prune.apply_masks(params, masks)
    return found


# --- stages ---


def fingerprint_game(setup: gans.Setup, name: str) -> FingerprintGame:
    """The game of an arm whose images carry fingerprints."""
    config, arm = setup.config, setup.config.arms[name]
    fields = {"style_from": "condition"} if config.generator.model == "stylegan2" else {}
    return FingerprintGame(
        setup.players(arm, arm.bits, **fields),
        config.game,
        condition=functools.partial(gan.sample_fingerprints, n_bits=arm.bits),
        sub=SUB,
        decoder=build_decoder(config, setup.shape, arm.bits),
        bits=arm.bits,
        weights=tuple(arm.weights),
        immunize=tuple(parse_perturbation(spec, "immunize") for spec in arm.immunize),
    )


def arm_stage(setup: gans.Setup, name: str) -> train.Stage:
    """The stage of one arm."""
    kind = setup.config.arms[name].kind
    return {"plain": plain_stage, "fingerprint": fingerprint_stage, "finetuned": finetuned_stage}[kind](setup, name)


def plain_stage(setup: gans.Setup, name: str) -> train.Stage:
    """A generator without a fingerprint, by the same loss."""
    arm = setup.config.arms[name]
    players = setup.players(arm)
    step = gan_games.make_step(setup, gan_games.Game(players, setup.config.game), arm.lr)

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> gan.GanState:
        return gan.create_gan_state(*players.init(key), step.g_optimizer, step.d_optimizer)

    return gans.stage(setup, name, setup.config.game.steps, step, init, gan_measures.of_players(setup, players))


def fingerprint_stage(setup: gans.Setup, name: str) -> train.Stage:
    """A generator for all fingerprints, and the decoder."""
    game = fingerprint_game(setup, name)
    step = gan_games.make_step(setup, game, setup.config.arms[name].lr)

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> gan.GanState:
        return gan.create_gan_state(*game.init(key), step.g_optimizer, step.d_optimizer)

    reading = Reading(setup, game)
    evaluators = gan_measures.Judge(setup, reading.sample).all(game.players)
    evaluators["bits"] = reading.evaluator(setup.config.eval_every)
    return gans.stage(setup, name, setup.config.game.steps, step, init, evaluators)


def finetuned_stage(setup: gans.Setup, name: str) -> train.Stage:
    """An instance with one user's fingerprint, trained on by somebody who has no decoder."""
    config, arm = setup.config, setup.config.arms[name]
    game = fingerprint_game(setup, arm.start)
    registry = registry_of(config.users, game.bits)
    players = dataclasses.replace(game.players, generator=game.players.generator.baked(), condition_dim=0)
    step = gan_games.make_step(setup, gan_games.Game(players, config.game), arm.lr)

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> gan.GanState:
        found = previous[arm.start].published
        params = gan.bake_fingerprint(game.players.generator, found["average"]["params"][SUB], registry[0])
        variables = {"params": params}, found["discriminator"]
        return gan.create_gan_state(*variables, step.g_optimizer, step.d_optimizer)

    def decoder(key: Any, previous: Mapping[str, train.Outcome], consts: Any) -> dict[str, Any]:
        return {"decoder": previous[arm.start].published["generator"]["params"]["decoder"]}

    evaluators = dict(gan_measures.of_players(setup, players))
    evaluators["bits"] = instance_evaluator(setup, players, game, registry[0])
    steps = max(1, round(arm.steps_share * config.game.steps))
    named: dict[str, Any] = {"needs": (gans.FEATURES, arm.start), "more": decoder}
    return gans.stage(setup, name, steps, step, init, evaluators, **named)


def instance_evaluator(setup: gans.Setup, players: gan.Players, game: FingerprintGame, bits: Any) -> train.Evaluator:
    """Bits read right in the images of one instance, after rounding to uint8."""
    assert game.decoder is not None
    read: Callable = game.decoder.read
    sample = gan_measures.averaged(players)

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        images = gan.from_uint8(gan.as_uint8(sample(published, consts, batch["index"])))
        logits = read(consts["decoder"], images)[1]
        right = metrics.bit_accuracy(logits, jnp.broadcast_to(bits[None], logits.shape))
        return {"right": jnp.where(mask, right, 0).sum(), "images": mask.sum()}

    def finish(sums: Any) -> dict[str, float]:
        return {"uint8": float(sums["right"] / sums["images"])}

    return train.Evaluator(setup.part("test"), collect, finish, every=setup.config.eval_every)


def stages(config: ConfigDict) -> list[train.Stage]:
    """The feature network, one stage for each arm, and the arms that those start from."""
    check(config)
    setup = gans.Setup.of(config)
    chosen = gans.selected_arms(config)
    starts = {config.arms[name].start for name in chosen if config.arms[name].kind == "finetuned"}
    names = [name for name in config.arms if name in {*chosen, *starts}]
    names.sort(key=lambda name: config.arms[name].kind == "finetuned")
    return [gans.feature_stage(setup), *(arm_stage(setup, name) for name in names)]


def generator(config: ConfigDict, stage: str) -> gans.Generator:
    """How a stage makes images: each with a fingerprint of its own where it writes any."""
    setup, arm = gans.Setup.of(config), gans.arm_of(config, stage)
    if arm.kind == "plain":
        return gans.generator(setup.players(arm))
    game = fingerprint_game(setup, arm.start if arm.kind == "finetuned" else stage)
    if arm.kind == "finetuned":
        plain = dataclasses.replace(game.players, generator=game.players.generator.baked(), condition_dim=0)
        return gans.generator(plain)
    return gans.generator(game.players, game.condition, SUB)


# --- claims ---


def changes(stages: Mapping[str, Any]) -> dict[str, Any]:
    """How much more a fingerprint changes an image without the constancy term, as a ratio."""
    with_term, without = (np.asarray(stages[n]["metrics"]["bits/change"], float) for n in ("full", "no_constant"))
    return {"ratio": {"metrics": {"change": (without / with_term).tolist()}, "history": {}}}


CLAIMS = (
    Claim("16 bits are read right", "0.99 of 128 bits", value=("full", "bits/uint8"), inside=(0.95, 1.0)),
    Claim("images are attributed", "so", value=("full", "bits/attributed"), inside=(0.9, 1.0)),
    Claim("real images carry no code", "0.5", value=("full", "bits/real"), inside=(0.45, 0.55)),
    Claim(
        "without the constancy term a fingerprint changes images 3 times as much",
        "so (in words)",
        value=("ratio", "change"),
        inside=(3.0, np.inf),
    ),
    Claim("without the bits' term nothing is read", "", value=("no_bits", "bits/uint8"), inside=(0.45, 0.55)),
    Claim(
        "an immunized decoder reads more after noise",
        "so",
        ("immunized", "bits/noise:0.1"),
        ("full", "bits/noise:0.1"),
    ),
    Claim(
        "fine-tuning an instance erases some of its bits",
        "",
        ("full", "bits/uint8"),
        ("finetuned", "bits/uint8"),
    ),
    Claim("the fingerprint costs quality here", "+2 FID", "plain", "full"),
)
FASHION = (
    Claim("64 bits are read right", "0.99 of 128 bits", value=("bits64", "bits/uint8"), inside=(0.95, 1.0)),
    Claim("images are attributed", "so", value=("bits64", "bits/attributed"), inside=(0.9, 1.0)),
    Claim("the fingerprint costs quality here", "+2 FID", "plain", "bits64"),
)
SHARED: dict[str, Any] = {"shared": (gans.FEATURES,), "given": "start.workdir"}
CONFIG = "configs/gan_fingerprinting.py"
STUDIES = (
    Study("digits", CONFIG, (0.001,), 0, CLAIMS, derived=changes, **SHARED),
    Study(
        "quality",
        CONFIG,
        (0.0005, 0.001, 0.002),
        2,
        (Claim("the fingerprint costs quality, each at its own rate", "+2 FID", "plain", "full"),),
        arms=("plain", "full"),
        **SHARED,
    ),
    # 64 bits are too many in this time already: 128 are not tried again.
    Study("fashion", f"{CONFIG}:fashion", (0.001,), 0, FASHION, arms=("plain", "bits64"), **SHARED),
)
