"""Generators adapted to a few images of another domain, and how fast their images lose variety.

Zhao, Ding, Huang and Cheung, A Closer Look at Few-shot Image Generation, CVPR 2022. A first stage trains a generator on
the source domain; every arm goes on from it with the shots of the target domain: by fine-tuning alone, with one or both
contrastive losses of the paper, or by one of the methods that it compares with. Quality and variety are followed over
the steps, because methods are to be compared where they are equally well adapted.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import gan_games, gan_measures, gans
from experiments.adaptation import Adaptation, PatchHead
from experiments.fewshot_claims import SOURCE, STUDIES
from experiments.report import Measure
from experiments.stored import Stored, check_seeds, one_of, stored_stage
from jkd import data, gan, metrics, train
from jkd.errors import UserError, unknown
from jkd.gan.training import GanState

__all__ = ["BASELINE", "MEASURE", "STUDIES", "generator", "predictor", "stages"]
BASELINE = "finetune"
MEASURE = Measure("test/frechet", "validation/frechet", "Frechet distance of features on target images", lower=True)
TRANSFORMS = ("none", "invert")
WEIGHTS = ("cl1", "cl2", "cdc", "ewc")


def check(config: ConfigDict) -> None:
    """Raises UserError for arms that could not be trained, before any data is read."""
    gans.check(config, (gans.FEATURES, SOURCE))
    adapt = config.adapt
    cls.check_numbers(adapt, "adapt", positive=("steps", "batch_size", "tau", "every"), nonnegative=("anchor_every",))
    cls.check_numbers(config.source, "source", positive=("lr",))
    if config.target.transform not in TRANSFORMS:
        raise unknown("target.transform", config.target.transform, TRANSFORMS)
    if config.target.shots < 1:
        raise UserError(f"target.shots must be at least 1, got {config.target.shots}.")
    for name in gans.selected_arms(config, (gans.FEATURES, SOURCE)):
        arm, field = config.arms[name], f"arms.{name}"
        cls.check_numbers(arm, field, nonnegative=WEIGHTS)
        if adapt.batch_size < 2 and (arm.cl1 or arm.cl2):
            raise UserError("adapt.batch_size must be at least 2: a contrast needs another image in the batch.")
        if adapt.batch_size < 3 and arm.cdc:
            raise UserError("adapt.batch_size must be at least 3 for cdc.")


# --- data ---


def target_task(config: ConfigDict, source: cls.Task) -> cls.Task:
    """The target domain: the data set of `target`, or that of the source, transformed."""
    target = config.target
    if not target.name:
        return dataclasses.replace(
            source, pool=changed(source.pool, target.transform), test=changed(source.test, target.transform)
        )
    section = config.copy_and_resolve_references()
    section.data.update({"name": target.name, "train_split": target.train_split, "test_split": target.test_split})
    task = cls.load_task(section)
    if task.shape != source.shape:
        raise UserError(
            f"target.name={target.name!r} has images {task.shape}, data.name={config.data.name!r} {source.shape}."
        )
    return dataclasses.replace(
        task, pool=changed(task.pool, target.transform), test=changed(task.test, target.transform)
    )


def changed(dataset: data.Dataset, transform: str) -> data.Dataset:
    """A data set in memory with every image transformed."""
    if transform == "none":
        return dataset
    batch = dataset.read(np.arange(len(dataset)))
    return data.from_arrays(
        255 - batch["image"], batch["label"], num_classes=dataset.num_classes, name=f"{dataset.name} inverted"
    )


def joined_task(source: cls.Task, target: cls.Task) -> cls.Task:
    """Both domains, whose classes are told apart: what the feature network is trained on."""
    pair = ((source.pool, target.pool), (source.test, target.test))
    pool, test = (data.concat(list(of)) for of in pair)
    return dataclasses.replace(source, pool=pool, test=test)


@dataclasses.dataclass(frozen=True, eq=False)
class Domains:
    """The setups of one config.

    Attributes:
      source: of the source domain.
      target: of the target domain.
      both: of the two together, for the feature network.
    """

    source: gans.Setup
    target: gans.Setup
    both: gans.Setup

    @classmethod
    def of(cls_, config: ConfigDict) -> "Domains":
        """Loads the data of a config."""
        first = cls.load_task(config)
        second = target_task(config, first)
        setup = gans.Setup.of(config, joined_task(first, second))
        return cls_(dataclasses.replace(setup, task=first), dataclasses.replace(setup, task=second), setup)


# --- the source ---


def source_stage(setup: gans.Setup) -> train.Stage:
    """The source domain's generator: trained, or taken from another run."""
    config = setup.config
    players = setup.players(config.source)
    step = gan_games.make_step(setup, gan_games.Game(players, config.game), config.source.lr)

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> GanState:
        return gan.create_gan_state(*players.init(key), step.g_optimizer, step.d_optimizer)

    made = gans.stage(setup, SOURCE, config.game.steps, step, init, gan_measures.of_players(setup, players))
    if not config.start.workdir:
        return made
    stored = Stored(config.start.workdir, SOURCE)

    def fits(outcome: train.Outcome) -> None:
        check_seeds(outcome, config, str(stored))
        wanted = jax.eval_shape(lambda: init(jax.random.key(0), {}, {}).variables)
        if jax.tree.map(jnp.shape, one_of(outcome)) != jax.tree.map(jnp.shape, wanted):
            raise UserError(f"{stored} holds other networks than this config's: set generator.* and discriminator.*.")

    return stored_stage(SOURCE, stored, config, fits)


# --- adaptation ---


def arm_stage(domains: Domains, name: str) -> train.Stage:
    """The stage of one arm."""
    setup, config, arm = domains.target, domains.target.config, domains.target.config.arms[name]
    players = setup.players(config.source)
    game = Adaptation(players, config.game, config.adapt, arm)
    rules = config.game.copy_and_resolve_references()
    rules.decay = config.adapt.decay
    plain = gan_games.make_step(setup, game, arm.lr)
    decay = gan.average_decay(config.adapt.batch_size, rules.half_life) if rules.half_life else rules.decay
    step = dataclasses.replace(plain, d_optimizer=frozen(plain.d_optimizer, arm.freeze_d), decay=decay)

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> GanState:
        found = previous[SOURCE].published
        critic = found["discriminator"]
        rest = {kind: tree for kind, tree in critic.items() if kind != "params"}
        params = {"whole": critic["params"]}
        if config.adapt.patch_layer:
            params["patch"] = patch_params(players, critic, config.adapt.patch_layer, key)
        return gan.create_gan_state(found["average"], {"params": params, **rest}, step.g_optimizer, step.d_optimizer)

    named: dict[str, Any] = {
        "needs": (gans.FEATURES, SOURCE),
        "more": functools.partial(adaptation_consts, setup, game),
    }
    evaluators = target_evaluators(setup, players)
    return gans.stage(
        setup, name, config.adapt.steps, step, init, evaluators, source=functools.partial(shots_source, setup), **named
    )


def patch_params(players: gan.Players, critic: Any, layer: str, key: jax.Array) -> Any:
    """Fresh parameters of the patch discriminator's head."""
    images = jnp.zeros((1, *players.shape))
    maps = jax.eval_shape(lambda: players.judge(critic, images, images)[0].features)
    if layer not in maps:
        raise unknown("adapt.patch_layer", layer, tuple(maps))
    return PatchHead().init(key, jnp.zeros(maps[layer].shape))["params"]


def frozen(optimizer: optax.GradientTransformation, patterns: tuple[str, ...]) -> optax.GradientTransformation:
    """The optimizer, which leaves parameters as they are whose paths hold one of the patterns."""
    if not patterns:
        return optimizer
    groups = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.partition(groups, lambda params: gan.freeze(params, patterns))


def adaptation_consts(
    setup: gans.Setup, game: Adaptation, key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any
) -> dict[str, Any]:
    """The frozen source, the shots, the anchors, and the Fisher information of the source's generator."""
    config, source = setup.config, previous[SOURCE].published
    shot_key, anchor_key, fisher_key = jax.random.split(key, 3)
    rows = np.asarray(consts["rows"]["train"])
    chosen = np.asarray(jax.random.permutation(shot_key, len(rows)))[: config.target.shots]
    shots = rows[chosen]
    found = {
        "source": source["average"],
        "shot_rows": np.asarray(shots, np.int32),
        "shots": gan.from_uint8(setup.plain(jnp.asarray(setup.task.pool.read(shots)["image"]))),
        "anchors": game.players.latents(anchor_key, config.target.shots),
    }
    if game.arm.ewc:
        fisher = _fisher(game.players, config.adapt.fisher_images)
        if config.data.blank:  # a plan: shapes will do
            shapes = jax.eval_shape(fisher, source, fisher_key)
            found["fisher"] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        else:
            found["fisher"] = fisher(source, fisher_key)
    return found


@functools.lru_cache(maxsize=16)
def _fisher(players: gan.Players, count: int) -> Any:
    def fisher(source: Any, key: jax.Array) -> Any:
        generator, critic = source["average"], source["discriminator"]

        def log_likelihood(params: Any, latent: jax.Array) -> jax.Array:
            variables = {**generator, "params": params}
            image = players.generate(variables, latent[None])[0].images
            return jax.nn.log_sigmoid(players.judge(critic, image, image)[0].logits[0])

        return gan.fisher_information(log_likelihood, generator["params"], players.latents(key, count))

    return jax.jit(fisher)


def shots_source(setup: gans.Setup, consts: Any) -> data.Source:
    """Batches of the shots."""
    few = setup.task.pool.subset(np.asarray(consts["shot_rows"]))
    return data.source(few, setup.config.adapt.batch_size, seed=int(consts["order"]), **setup.task.loader)


# --- quality and variety ---


def target_evaluators(setup: gans.Setup, players: gan.Players) -> dict[str, train.Evaluator]:
    """Distances to the target's images, and how varied the generated ones are, over the steps."""
    return dict(_target_evaluators(setup, players))


@functools.lru_cache(maxsize=16)
def _target_evaluators(setup: gans.Setup, players: gan.Players) -> dict[str, train.Evaluator]:
    every = setup.config.adapt.every
    judge = gan_measures.Judge(setup, gan_measures.averaged(players))
    return {
        "validation": judge.frechet("validation"),
        "test": judge.frechet("test", every),
        "manifold": judge.manifold(),
        "variety": variety(setup, judge, every),
        "gallery": judge.gallery(None, every=every),
    }


def variety(setup: gans.Setup, judge: gan_measures.Judge, every: int) -> train.Evaluator:
    """Intra-cluster distances of pixels and of features, the distance to the nearest shot, and the target's share.

    The clusters are those of the shots: an image belongs to the nearest. `target`: the mean probability that the
    feature network, which knows both domains, gives to the classes of the target.
    """
    section, classes = setup.config.features, setup.task.num_classes

    def look(consts: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unit features, and the target's probability."""
        seen = setup.feature_outputs(consts["features"], gan.as_uint8(images))
        share = jax.nn.softmax(seen.logits)[:, -classes:].sum(1)
        vectors = seen.features[section.layer]
        vectors = vectors.reshape(len(vectors), -1)
        return vectors / (jnp.linalg.norm(vectors, axis=1, keepdims=True) + 1e-10), share

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        images, shots = judge.sample(published, consts, batch["index"]), consts["shots"]
        (features, share), (of_shots, _) = look(consts, images), look(consts, shots)
        flat = images.reshape(len(images), -1)
        return {
            "pixels": flat,
            "features": features,
            "to_shots": metrics.euclidean_distances(flat, shots.reshape(len(shots), -1)),
            "features_to_shots": metrics.euclidean_distances(features, of_shots),
            "share": share,
        }

    def finish(rows: Any) -> dict[str, float]:
        return {name: float(value) for name, value in _variety(rows).items()}

    limit = setup.config.judge.neighbours
    return train.Evaluator(setup.part("test", limit), collect, finish, kind="gather", every=every)


@jax.jit
def _variety(rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    found = {}
    for name, near in (("pixels", "to_shots"), ("features", "features_to_shots")):
        between = metrics.euclidean_distances(rows[name], rows[name])
        found[name] = metrics.intra_cluster_distance_of_matrices(rows[near], between).mean
    return {**found, "nearest_shot": rows["to_shots"].min(1).mean(), "target": rows["share"].mean()}


def stages(config: ConfigDict) -> list[train.Stage]:
    """The feature network of both domains, the source's generator, and one stage for each arm."""
    check(config)
    domains = Domains.of(config)
    arms = gans.selected_arms(config, (gans.FEATURES, SOURCE))
    return [
        gans.feature_stage(domains.both),
        source_stage(domains.source),
        *(arm_stage(domains, name) for name in arms),
    ]


def generator(config: ConfigDict, stage: str) -> gans.Generator:
    """How a stage makes images: all have the networks of the source."""
    if stage != SOURCE:
        gans.arm_of(config, stage)  # for its check
    return gans.generator(Domains.of(config).source.players(config.source))


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the feature network classifies images of both domains."""
    return gans.predictor(config, stage, Domains.of(config).both.task)
