"""Generators and discriminators of a config: data, networks, the features they are judged by, and their stages."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import networks as nets
from experiments.gan_games import PENALTIES
from experiments.gan_networks import MODELS, build_discriminator, build_generator
from experiments.optimizers import check_optimizer, make_optimizer
from experiments.stored import Stored, stored_stage
from jkd import data, gan, nn, train
from jkd.errors import UserError, unknown
from jkd.gan.players import Players, from_uint8

FEATURES = "features"  # the stage of the network that images are compared by


def selected_arms(config: ConfigDict, shared: Sequence[str] = (FEATURES,)) -> list[str]:
    """The arms to run: those in `only`, or all; names of shared stages alone train no arm.

    Raises:
      UserError: for a name in `only` that is neither.
    """
    for name in config.only:
        if name not in (*config.arms, *shared):
            raise unknown("arm in config.only", name, (*config.arms, *shared))
    return [name for name in config.only or config.arms if name in config.arms]


def arm_of(config: ConfigDict, stage: str) -> ConfigDict:
    """The section of an arm.

    Raises:
      UserError: for a stage that is none.
    """
    if stage not in config.arms:
        raise unknown("stage that makes images", stage, tuple(config.arms))
    return config.arms[stage]


def check(config: ConfigDict, shared: Sequence[str] = (FEATURES,)) -> None:
    """Raises UserError for numbers that no generator could be trained with."""
    cls.member_keys(config)
    game, judge = config.game, config.judge
    cls.check_numbers(config, "", nonnegative=("eval_every",))
    positive = ("steps", "penalty_every", "path_every", "path_shrink", "eps")
    nonnegative = ("penalty_weight", "path_weight", "drift", "half_life")
    cls.check_numbers(game, "game", positive=positive, nonnegative=nonnegative)
    for name in ("beta1", "beta2", "decay"):
        if not 0 <= game[name] < 1:
            raise UserError(f"game.{name} must lie in [0, 1), got {game[name]}.")
    if game.penalty not in PENALTIES:
        raise unknown("game.penalty", game.penalty, PENALTIES)
    cls.check_numbers(judge, "judge", positive=("per_image", "gallery"), nonnegative=("neighbours",))
    cls.check_numbers(config.generator, "generator", positive=("latent_dim",))
    for part in ("generator", "discriminator"):
        if config[part].model not in MODELS:
            raise unknown(f"{part}.model", config[part].model, MODELS)
    cls.check_numbers(config.features, "features", positive=("lr", "epochs"))
    check_optimizer(config.features, "features", "features.milestones", config.features.milestones)
    if config.features.init_from:
        Stored.parse(config.features.init_from, "features.init_from")
    for name in selected_arms(config, shared):
        cls.check_numbers(config.arms[name], f"arms.{name}", positive=("lr",))


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share.

    Attributes:
      config: the whole of it.
      task: its data; all seeds train on the same rows and are judged by the same.
      views: how real images are augmented, and how the feature network sees images.
      feature_model: the network that images are compared by.
    """

    config: Any
    task: cls.Task
    views: cls.Views
    feature_model: Any

    @classmethod
    def of(cls_, config: ConfigDict, task: cls.Task | None = None) -> "Setup":
        """Builds the feature network of a config for a task, by default that of its data, which is then loaded."""
        task = task or cls.load_task(config)
        section = config.features
        known = {"mlp": {"hidden": tuple(section.hidden), "norm": section.norm}, "cnn": {"width": section.width}}
        options = {"fid": True} if section.fid else known.get(section.model, {})
        model = nn.build(section.model, section.num_classes or task.num_classes, **options)
        views = dataclasses.replace(cls.make_views(config)["weak"], mean=tuple(section.mean), std=tuple(section.std))
        return cls_(config, task, views, model)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of an image as the networks see it."""
        side = self.config.data.resize
        return (side, side, self.task.shape[-1]) if side else self.task.shape

    @functools.cached_property
    def rows(self) -> dict[str, Any]:
        """The rows of each part of the data."""
        return self.task.split(jax.random.key(self.config.features.seed))

    def draw(self, key: jax.Array) -> dict[str, Any]:
        """The consts of a stage that reads training rows in an order of its own."""
        return {"rows": self.rows, "order": jax.random.randint(key, (), 0, cls.SPLIT_SEEDS)}

    def real(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Stored images as the discriminator sees them: augmented, in [-1, 1]."""
        return from_uint8(self.views.augment(key, images))

    def plain(self, images: jax.Array) -> jax.Array:
        """Stored images as they are, at the size of generated ones: uint8."""
        side = self.config.data.resize
        return jnp.round(data.resize(images, side)).astype(jnp.uint8) if side else images

    def features(self, variables: Any, images: jax.Array) -> jax.Array:
        """Features [batch, dim] of uint8 images, generated or stored."""
        found = self.feature_outputs(variables, images).features[self.config.features.layer]
        return found.mean((1, 2)) if found.ndim == 4 else found

    def feature_outputs(self, variables: Any, images: jax.Array) -> nn.Outputs:
        """All that the feature network says of uint8 images."""
        section = self.config.features
        if section.rgb:
            images = jnp.broadcast_to(images[..., :1], (*images.shape[:-1], 3))
        if section.fid:
            seen = nn.fid_images(images.astype(jnp.float32) / 255)
        else:
            images = data.resize(images, section.resize) if section.resize else images
            seen = data.normalize(images, section.mean, section.std)
        return self.feature_model.apply(variables, seen, train=False)  # type: ignore[return-value]

    @functools.cached_property
    def feature_shape(self) -> tuple[int, int, int]:
        """Of an image as the feature network sees it."""
        section, (height, width, channels) = self.config.features, self.shape
        side = section.resize
        side = 299 if section.fid else side
        return (side or height, side or width, 3 if section.rgb else channels)

    def part(self, name: str, limit: int = 0) -> Callable[[Any], data.Source]:
        """The source of an evaluator: the first `limit` (0: all) "validation" or "test" rows in order."""

        def source(consts: Any) -> data.Source:
            kept = {**consts, "rows": {name: consts["rows"][name][: limit or None]}}
            return self.task.part(kept, name, self.config.eval_batch_size)

        return source

    def players(self, arm: ConfigDict, condition_dim: int = 0, **g_fields: Any) -> Players:
        """The networks of an arm, whose own attention is added to that of the config."""
        config = self.config
        parts = []
        for part, build, fields in (
            ("generator", build_generator, {"condition_dim": condition_dim, **g_fields}),
            ("discriminator", build_discriminator, {}),
        ):
            section = config[part].copy_and_resolve_references()
            section.attention = (*section.attention, *arm.get(f"{part}_attention", ()))
            parts.append(build(section, self.shape, config.precision, **fields))
        section = config.generator
        generator, discriminator = parts
        return Players(generator, discriminator, self.shape, section.latent_dim, condition_dim, section.style_mixing)


def feature_stage(setup: Setup) -> train.Stage:
    """The feature network: trained on labels, the same for all seeds; or taken from elsewhere."""
    config, section = setup.config, setup.config.features
    if section.init_from and config.data.blank:  # a plan: the weights need not be here
        return train.Stage(
            FEATURES, 0, init=lambda key, previous, consts: nn.init(setup.feature_model, key, setup.feature_shape)
        )
    if section.init_from or config.start.workdir:
        given = section.init_from
        stored = Stored.parse(given, "features.init_from") if given else Stored(config.start.workdir, FEATURES)
        stored = dataclasses.replace(stored, model=setup.feature_model, shape=setup.feature_shape)
        return stored_stage(FEATURES, stored, config, functools.partial(check_features, setup, str(stored)))
    if section.rgb or section.resize or section.fid:
        raise UserError(
            "features.rgb, .resize and .fid are for a given network: set features.init_from to its weights."
        )
    steps, per_epoch = cls.steps_of(config, setup.task, section.epochs)
    optimizer = make_optimizer(section, section.lr, steps, per_epoch)
    step = nets.cross_entropy_step(setup.feature_model, setup.views, optimizer, section.smoothing)

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        return train.create_state(nn.init(setup.feature_model, key, setup.feature_shape), optimizer)

    return train.Stage(
        FEATURES,
        steps,
        prepare=lambda key, previous, sweep: setup.draw(key),
        data=lambda consts: setup.task.source(consts, config.batch_size),
        init=init,
        step=step,
        publish=nets.variables_of,
        evaluators=cls.accuracy_evaluators(config, setup.task, setup.feature_model, setup.views, 0.0),
        key=jax.random.key(section.seed),
    )


def check_features(setup: Setup, where: str, outcome: train.Outcome) -> None:
    """Raises UserError unless a stored network is the config's feature network."""
    wanted = jax.eval_shape(lambda: nn.init(setup.feature_model, jax.random.key(0), setup.feature_shape))
    if outcome.members or jax.tree.map(jnp.shape, outcome.published) != jax.tree.map(jnp.shape, wanted):
        raise UserError(
            f"{where} is not one {setup.config.features.model!r} as features.* describes it: set features.model, "
            "features.num_classes, features.rgb and features.resize to what it was trained with."
        )


def stage(
    setup: Setup,
    name: str,
    num_steps: int,
    step: Callable,
    init: Callable,
    evaluators: Mapping[str, train.Evaluator],
    *,
    needs: Sequence[str] = (FEATURES,),
    more: Callable = lambda key, previous, consts: {},
    source: Callable | None = None,
    **fields: Any,
) -> train.Stage:
    """A stage of two networks, for each seed; it publishes `gan.GanState.variables`.

    Args:
      setup: of the config.
      name: of the stage.
      num_steps: of the stage.
      step: `Stage.step`.
      init: `Stage.init`, which returns a `gan.GanState`.
      evaluators: `Stage.evaluators`, whose consts hold "features", the variables of the feature network.
      needs: `Stage.needs`, the stage of the features among them.
      more: `(key, previous, consts) -> dict`: consts beside rows, order and features.
      source: of the training batches, by default the training rows.
      **fields: of `Stage`.
    """

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        order, rest = jax.random.split(key)
        consts = setup.draw(order) | {"features": previous[FEATURES].published}
        return consts | more(rest, previous, consts)

    made = train.Stage(
        name,
        num_steps,
        needs=tuple(needs),
        prepare=prepare,
        data=source or (lambda consts: setup.task.source(consts, setup.config.batch_size)),
        init=init,
        step=step,
        publish=published,
        evaluators=evaluators,
        **fields,
    )
    made = train.remat(made) if setup.config.remat else made
    return train.ensemble(made, keys=cls.member_keys(setup.config), mode=setup.config.ensemble)


def predictor(config: ConfigDict, stage: str, task: cls.Task | None = None) -> cls.Predictor:
    """How the feature network classifies images; nothing else of a run of generators does.

    Raises:
      UserError: for another stage.
    """
    if stage != FEATURES:
        raise UserError(
            f"Stage {stage!r} makes images: use python -m experiments.sample. Only {FEATURES!r} classifies."
        )
    setup = Setup.of(config, task)
    return cls.classifier(setup.feature_model, setup.task, setup.views)


@dataclasses.dataclass(frozen=True)
class Generator:
    """What `experiments.sample` runs.

    Attributes:
      sample: `sample(published, latents, key) -> images` in [-1, 1], traced.
      latent_dim: of a latent.
    """

    sample: Callable[[Any, jax.Array, jax.Array], jax.Array]
    latent_dim: int


def generator(players: Players, condition: Callable | None = None, sub: str = "") -> Generator:
    """The averaged generator of two networks; see `gan_games.Game` for `condition` and `sub`."""

    def sample(published: Any, latents: jax.Array, key: jax.Array) -> jax.Array:
        own = published["average"]
        variables = {**own, "params": own["params"][sub]} if sub else own
        drawn = None if condition is None else condition(key, len(latents))
        return players.generate(variables, latents, drawn)[0].images

    return Generator(sample, players.latent_dim)


def published(state: gan.GanState) -> dict[str, Any]:
    """What a stage of two networks publishes."""
    return state.variables
