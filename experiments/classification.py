"""Image classification as a task: splits, views, optimizers, accuracy; shared by the methods that train classifiers."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jkd import data, metrics, nn, train
from jkd.errors import UserError, unknown

SPLIT_SEEDS = 2**31 - 1
# Published augmentation policies for color images, by name.
POLICIES: dict[str, Any] = {
    "none": None,
    "randaugment": data.rand_augment,
    "autoaugment_cifar10": functools.partial(data.auto_augment, policy="cifar10"),
    "autoaugment_imagenet": functools.partial(data.auto_augment, policy="imagenet"),
}
PRECISIONS = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Task:
    """The data of one config.

    Attributes:
      config: its `data` section.
      pool: the set that training and validation rows are drawn from.
      test: the set of all test rows; it shares no row with the pool.
      loader: how streamed sources read: {"workers", "prefetch"}.
    """

    config: Any
    pool: data.Dataset
    test: data.Dataset
    loader: Any

    @property
    def num_classes(self) -> int:
        """Of the labels."""
        return self.pool.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.pool.shape

    def split(self, key: jax.Array) -> dict[str, np.ndarray]:
        """Draws the rows {"train", "validation", "test"}; equal keys draw equal rows.

        Validation rows are class-balanced like the pool; the long tail is cut from what remains for training.
        """
        seed = int(jax.random.randint(key, (), 0, SPLIT_SEEDS))
        c, rest = self.config, self.pool
        rows = {}
        if c.validation_examples:
            validation, rest = rest.split(c.validation_examples, seed=seed)
            rows["validation"] = validation.indices
        chosen = rest.split(c.train_examples, seed=seed)[0] if c.train_examples else rest
        rows["train"] = chosen.long_tail(c.imbalance, seed=seed).indices if c.imbalance != 1 else chosen.indices
        rows["test"] = np.arange(len(self.test))
        return {name: np.asarray(index, np.int32) for name, index in rows.items()}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The number of rows in each part; the same for every key."""
        return {name: len(index) for name, index in self.split(jax.random.key(0)).items()}

    def source(self, consts: Any, batch_size: int) -> data.Source:
        """The training batches of a stage whose consts hold `rows` and `order`."""
        part = self.pool.subset(np.asarray(consts["rows"]["train"]))
        return data.source(part, batch_size, seed=int(consts["order"]), **self.loader)

    def part(self, consts: Any, name: str, batch_size: int) -> data.Source:
        """The "train", "validation" or "test" rows in order."""
        whole = self.test if name == "test" else self.pool
        return data.source(whole.subset(np.asarray(consts["rows"][name])), batch_size, seed=None, **self.loader)

    def draw(self, key: jax.Array, replica: int = 0) -> dict[str, Any]:
        """The consts that `source` and `part` need, drawn from a stage's prepare key.

        Another `replica` reads the same rows in another order.
        """
        split, order = jax.random.split(key)
        return {"rows": self.split(split), "order": jax.random.randint(replica_key(order, replica), (), 0, SPLIT_SEEDS)}


def replica_key(key: jax.Array, replica: int) -> jax.Array:
    """The key of one of several equal stages that should differ; the first keeps `key`."""
    return jax.random.fold_in(key, replica) if replica else key


def load_task(config: ConfigDict) -> Task:
    """Loads the data of a config, or stand-ins of the same shape where `data.blank` is set (for plans).

    Raises:
      UserError: if the data cannot be loaded, test rows are among those to train on, or there is less than a batch.
    """
    c, loader = config.data, {"workers": config.loop.workers, "prefetch": config.loop.prefetch}
    if c.blank:
        shape, classes = tuple(c.shape), c.num_classes
        make = functools.partial(data.blank, shape=shape, num_classes=classes, name=c.name)
        return Task(c, make(c.num_examples), make(max(c.num_examples // 10, config.eval_batch_size)), loader)
    load = functools.partial(data.load, c.name, data_dir=c.data_dir or None, image_size=c.image_size or None)
    test = load(c.test_split)
    task = Task(c, load(c.train_split), test.per_class(c.test_per_class) if c.test_per_class else test, loader)
    _check_sizes(config, len(task.pool))
    for name in ("mean", "std"):
        if len(c[name]) not in (1, task.shape[-1]):
            raise UserError(f"data.{name} must be one number or one a channel ({task.shape[-1]}), got {len(c[name])}.")
    if task.pool.overlaps(task.test):
        raise UserError(
            f"data.train_split={c.train_split!r} and data.test_split={c.test_split!r} of {c.name!r} share rows: give "
            "splits that do not, such as 'train[:90%]' and 'train[90%:]'."
        )
    if task.sizes["train"] < config.batch_size:
        raise UserError(
            f"There are {task.sizes['train']} training rows, less than a batch: batch_size is {config.batch_size}. "
            "Set a smaller batch_size, or more data.train_examples."
        )
    return task


def _check_sizes(config: ConfigDict, rows: int) -> None:
    c = config.data
    if min(c.train_examples, c.validation_examples) < 0 or c.train_examples + c.validation_examples >= rows:
        raise UserError(
            f"data.train_examples={c.train_examples} and data.validation_examples={c.validation_examples} must be >= 0 "
            f"and together less than the {rows} rows of data.train_split; train_examples=0 takes all others."
        )
    if not c.imbalance >= 1:
        raise UserError(f"data.imbalance must be >= 1 (1: no long tail), got {c.imbalance}.")


@dataclasses.dataclass(frozen=True)
class Views:
    """Images as a model sees them: augmented for training, plain for evaluation; float32, normalized.

    `size` is the side that images are resized to, 0 for their own.
    """

    augment: Callable
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int = 0

    def train(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """A random view of every image."""
        return data.normalize(self.augment(key, images), self.mean, self.std)

    def plain(self, images: jax.Array) -> jax.Array:
        """The images themselves."""
        return data.normalize(data.resize(images, self.size) if self.size else images, self.mean, self.std)


def make_views(config: ConfigDict) -> dict[str, Views]:
    """The "weak" and the "strong" views of a config's `data` section, each with its steps in the order of its fields.

    Raises:
      UserError: for a negative size, an unknown policy, or a `std` that is not positive.
    """
    c = config.data
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        if not all(math.isfinite(value) and value > least for value in c[name]):
            raise UserError(f"data.{name} must be finite{' and > 0' if name == 'std' else ''}, got {c[name]}.")
    if c.resize < 0:
        raise UserError(f"data.resize must be >= 0 pixels, got {c.resize}.")
    numbers = (tuple(c.mean), tuple(c.std), c.resize)
    return {name: Views(augmentation(c[name], f"data.{name}", c.resize), *numbers) for name in ("weak", "strong")}


def augmentation(section: ConfigDict, field: str, size: int = 0) -> Callable:
    """The steps of one section, composed in the order of its fields.

    The first is a random crop or else a resizing, to `size`; a crop keeps the images' own size where that is 0.
    """
    for name in ("shift", "pad_crop", "cutout", "rotation"):
        if section[name] < 0:
            raise UserError(f"{field}.{name} must be >= 0, got {section[name]}.")
    for name in ("crop", "jitter"):
        if not 0 <= section[name] <= 1:
            raise UserError(f"{field}.{name} must lie in [0, 1], got {section[name]}.")
    if section.policy not in POLICIES:
        raise unknown(f"{field}.policy", section.policy, tuple(POLICIES))
    steps: list[Callable] = []
    if section.crop:
        steps.append(lambda key, images: data.random_resized_crop(key, images, size or images.shape[1], section.crop))
    elif size:
        steps.append(lambda key, images: data.resize(images, size))
    if section.shift:
        steps.append(functools.partial(data.shift, max_shift=section.shift))
    if section.pad_crop:
        steps.append(functools.partial(data.pad_crop, padding=section.pad_crop))
    if section.flip:
        steps.append(data.flip)
    if section.rotation:
        steps.append(functools.partial(data.random_rotation, degrees=section.rotation))
    if section.jitter:
        steps.append(functools.partial(data.color_jitter, strength=section.jitter))
    if section.policy != "none":
        steps.append(POLICIES[section.policy])
    if section.cutout:
        steps.append(functools.partial(data.cutout, size=section.cutout))
    return data.compose(*steps) if steps else lambda key, images: images


def dtypes(precision: str) -> dict[str, Any]:
    """`dtype` and `param_dtype` of networks that compute in `precision`.

    Parameters, statistics, logits and losses, and all sums over devices, are float32 for "float32" and "bfloat16", and
    float64 for "float64".

    Raises:
      UserError: for another precision, or float64 without 64-bit JAX.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "float64" and jax.dtypes.canonicalize_dtype("float64") != np.float64:
        raise UserError("precision=float64 needs 64-bit JAX: set the environment variable JAX_ENABLE_X64=1.")
    dtype = jnp.dtype(precision)
    return {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}


def build_model(config: ConfigDict, task: Task, precision: str) -> Any:
    """The model of a `teacher` or `student` section; `precision` as of `dtypes`."""
    options: dict[str, Any] = {}
    if config.model == "mlp":
        options = {"hidden": tuple(config.hidden), "norm": config.norm}
    if config.model == "cnn":
        options = {"width": config.width}
    types = dtypes(precision)
    if config.model == "mlp" and min(config.hidden, default=1) < 1:
        raise UserError(f"hidden must be widths >= 1, got {tuple(config.hidden)}.")
    return nn.build(config.model, task.num_classes, **types, **options)


def transformed(config: ConfigDict, task: Task, stage: train.Stage) -> train.Stage:
    """A stage with the config's `remat`, `microbatches` and `average`.

    Raises:
      UserError: for micro-batches that do not divide the batch, or an average that does not exist.
    """
    if config.microbatches < 1 or config.batch_size % config.microbatches:
        raise UserError(
            f"microbatches must be >= 1 and divide batch_size={config.batch_size}, got {config.microbatches}."
        )
    check_numbers(config.average, "average", nonnegative=("start_epoch", "decay"))
    if config.remat:
        stage = train.remat(stage)
    if config.microbatches > 1:
        stage = train.microbatch(stage, config.microbatches)
    if config.average.kind == "none":
        return stage
    if config.average.kind not in train.AVERAGES:
        raise unknown("average.kind", config.average.kind, ("none", *train.AVERAGES))
    start = round(config.average.start_epoch * steps_of(config, task, 1)[1])
    return train.average(stage, config.average.kind, decay=config.average.decay, start=start)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """What `experiments.predict` runs: `predictor(published, uint8[B, *shape]) -> {name: rows}`, traced.

    Attributes:
      fn: the call, for one member; its rows are "logits", "probabilities" and "pool".
      shape: of one image.
      variables: the shapes and dtypes of what the stage must have published.
      model: what they are the variables of,
      plain: published -> the model's own variables, where a stage publishes a smaller form of them.
    """

    fn: Callable[[Any, jax.Array], dict[str, jax.Array]]
    shape: tuple[int, int, int]
    variables: Any
    model: Any
    plain: Callable[[Any], Any] = lambda published: published

    def __call__(self, published: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Rows for the images."""
        return self.fn(published, images)

    def check(self, published: Any) -> None:
        """Raises UserError unless stored variables are those of the model for images of this shape."""
        if jax.tree.map(jnp.shape, published) != jax.tree.map(jnp.shape, self.variables):
            raise UserError(
                f"The stored model does not take images of shape {list(self.shape)}, which the config names: it was "
                "trained on another data set. Leave data.blank out, so that the shape is read from that set."
            )


def classifier(model: Any, task: Task, views: Views, variables: Any = None) -> Predictor:
    """The predictor of a classifier that publishes its variables; by default those that `nn.init` makes."""

    def predict(published: Any, images: jax.Array) -> dict[str, jax.Array]:
        out = model.apply(published, views.plain(images), train=False)
        return {
            "logits": out.logits,
            "probabilities": jax.nn.softmax(out.logits),
            "pool": out.features["pool"],
        }

    shapes = variables or jax.eval_shape(lambda: nn.init(model, jax.random.key(0), task.shape))
    return Predictor(predict, task.shape, shapes, model)


def check_numbers(section: ConfigDict, name: str, *, positive: tuple = (), nonnegative: tuple = ()) -> None:
    """Raises UserError unless these fields of the section `name` ("": the config) are finite and > 0, or >= 0."""
    for field in (*positive, *nonnegative):
        value, least = section[field], "> 0" if field in positive else ">= 0"
        if not (math.isfinite(value) and value >= 0 and (value > 0 or field in nonnegative)):
            shown = f"{name}.{field}" if name else field
            raise UserError(f"{shown} must be finite and {least}, got {value}.")


def steps_of(config: ConfigDict, task: Task, epochs: float, batch_size: int = 0) -> tuple[int, float]:
    """The number of steps in so many epochs, and the steps in one; of the config's batch size by default."""
    per_epoch = task.sizes["train"] / (batch_size or config.batch_size)
    return max(1, round(epochs * per_epoch)), per_epoch


def accuracy_evaluators(config: ConfigDict, task: Task, model: Any, views: Views, steps_per_epoch: float) -> dict:
    """Top-1 (and top-5 from 20 classes on) accuracy in percent, on the validation and test rows."""
    ranks = (1, 5) if task.num_classes >= 20 else (1,)

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        logits = model.apply(published, views.plain(batch["image"]), train=False).logits
        hits = {f"top{k}": (metrics.topk_correct(logits, batch["label"], k) & mask).sum() for k in ranks}
        return {**hits, "total": mask.sum()}

    def finish(sums: Any) -> dict[str, float]:
        return {f"top{k}": 100 * float(sums[f"top{k}"]) / float(sums["total"]) for k in ranks}

    def evaluator(name: str) -> train.Evaluator:
        source = functools.partial(task.part, name=name, batch_size=config.eval_batch_size)
        every = round(config.get("eval_epochs", 0.0) * steps_per_epoch)
        return train.Evaluator(source, collect, finish, every=every)

    return {name: evaluator(name) for name in ("validation", "test") if name in task.sizes}


def member_keys(config: ConfigDict) -> jax.Array:
    """One key for each of the config's paired seeds; the same for all stages.

    Raises:
      UserError: if `seeds` is below 1, or `seed` is not in [0, 2^31).
    """
    if config.seeds < 1 or not 0 <= config.seed < 2**31:
        raise UserError(f"seeds must be >= 1 and seed in [0, 2^31), got seeds={config.seeds}, seed={config.seed}.")
    return jax.random.split(jax.random.key(config.seed), config.seeds)
