"""Pairs as a task: which sets there are, who trains, who asks and what is searched; shared by cross-modal methods.

Every example has columns "first" and "second" (features, images, or vectors of tokens with a mask) and "label", its
class or classes, which decides what is relevant and nothing else: no method here trains on it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.classification import SPLIT_SEEDS, replica_key
from jkd import data
from jkd.data import pairs as made
from jkd.errors import UserError, unknown

SIDES = ("first", "second")
FILES = ("mirflickr", "nuswide", "file")  # features that users bring
STATISTICS_ROWS = 10000  # training rows whose mean and scale are measured


@dataclasses.dataclass(frozen=True)
class PairTask:
    """The pairs of one config.

    Attributes:
      config: its `data` section.
      pool: all examples.
      given: the rows of each part, where the set says so; else every seed draws its own.
      loader: how streamed sources read: {"workers", "prefetch"}.
    """

    config: Any
    pool: data.Examples
    given: Mapping[str, np.ndarray]
    loader: Any

    @property
    def num_classes(self) -> int:
        """Of the labels."""
        return self.pool.num_classes

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one example, by column."""
        return {name: column.shape[1:] for name, column in self.pool.read(np.zeros(1, np.int32)).items()}

    def split(self, key: jax.Array) -> dict[str, np.ndarray]:
        """The rows {"train", "validation", "query", "database"}; equal keys draw equal rows.

        Queries and validation queries are in neither of the others; training rows are also searched. A set that names
        its parts keeps them, and validation queries that it lacks are drawn from what is searched.
        """
        seed = int(jax.random.randint(key, (), 0, SPLIT_SEEDS))
        c, rows = self.config, {name: of for name, of in self.given.items() if name != "database"}
        if self.given:
            searched = np.sort(np.concatenate([of for name, of in self.given.items() if name in ("train", "database")]))
            rest = self.pool.subset(searched)
        else:
            query, rest = self.pool.split(c.query_examples, seed=seed)
            rows["query"] = query.indices
        if "validation" not in rows and c.validation_examples:
            validation, rest = rest.split(c.validation_examples, seed=seed + 1)
            rows["validation"] = validation.indices
        rows["database"] = rest.indices
        rows["train"] = np.intersect1d(rows["train"], rest.indices) if "train" in rows else rest.indices
        if c.train_examples and c.train_examples < len(rows["train"]):
            rows["train"] = self.pool.subset(rows["train"]).split(c.train_examples, seed=seed + 2)[0].indices
        return {name: np.asarray(index, np.int32) for name, index in rows.items()}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The number of rows in each part; the same for every key."""
        return {name: len(index) for name, index in self.split(jax.random.key(0)).items()}

    def draw(self, key: jax.Array, replica: int = 0) -> dict[str, Any]:
        """The consts that the others need, drawn from a stage's prepare key: rows, an order, and `statistics`."""
        split, order = jax.random.split(key)
        rows = self.split(split)
        drawn = jax.random.randint(replica_key(order, replica), (), 0, SPLIT_SEEDS)
        return {"rows": rows, "order": drawn, "statistics": self.statistics(rows["train"])}

    def statistics(self, rows: np.ndarray) -> dict[str, dict[str, Any]]:
        """The mean of each side over (the first of) the training rows, and one scale: the root mean square around it.

        Vectors of tokens keep a mean of zero: how many there are varies.
        """
        batch = self.pool.rows.read(rows[: 1 if self.config.blank else STATISTICS_ROWS])
        found = {}
        for side in SIDES:
            x = np.asarray(batch[side], np.float64)
            mean = np.zeros(x.shape[1:]) if f"{side}_mask" in batch else x.mean(0)
            seen = (x - mean)[batch[f"{side}_mask"]] if f"{side}_mask" in batch else x - mean
            scale = np.sqrt((seen**2).mean()) if seen.size else 0  # stand-ins of texts have no words
            found[side] = {"mean": mean.astype(np.float32), "scale": np.float32(scale if scale > 0 else 1)}
        return found

    def view(self, consts: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch whose sides are centered and scaled by the statistics; padding stays zero."""
        numbers = consts["statistics"]
        seen = {side: (batch[side] - numbers[side]["mean"][None]) / numbers[side]["scale"] for side in SIDES}
        return {**batch, **seen}

    def source(self, consts: Any, batch_size: int) -> data.Source:
        """The training batches of a stage."""
        part = self.pool.subset(np.asarray(consts["rows"]["train"]))
        return data.source(part, batch_size, seed=int(consts["order"]), **self.loader)

    def part(self, consts: Any, name: str, batch_size: int) -> data.Source:
        """The rows of a part in order; "a+b" is those of a, then those of b."""
        rows = np.concatenate([np.asarray(consts["rows"][one]) for one in name.split("+")])
        return data.source(self.pool.subset(rows), batch_size, seed=None, **self.loader)


def _digit_halves(c: ConfigDict) -> data.Examples:
    return made.load_image_halves(c.images, c.data_dir or None)


def _fashion_text(c: ConfigDict) -> data.Examples:
    images = data.load("fashion_mnist", "all", c.data_dir or None)
    if c.examples:
        images = images.split(c.examples)[0]
    return made.with_label_text(images, "fashion_mnist", c.text, variants=c.variants, words=c.words)


def _factors(c: ConfigDict) -> data.Examples:
    return made.make_factors(c.examples or 3000, private=c.private, noise=c.noise, seed=c.seed)


def _clusters(c: ConfigDict) -> data.Examples:
    return made.make_two_view_clusters(c.examples or 400, c.clusters, noise=c.noise, seed=c.seed)


SETS: dict[str, Callable[[ConfigDict], data.Examples]] = {
    "digit_halves": _digit_halves,
    "fashion_text": _fashion_text,
    "factors": _factors,
    "clusters": _clusters,
}


def section(name: str = "digit_halves", **changes: Any) -> ConfigDict:
    """The `data` section of a config of pairs."""
    c = ConfigDict()
    c.name = name  # digit_halves, fashion_text, factors, clusters, or mirflickr, nuswide, file, tfds: users' own
    # digit_halves, fashion_text: a folder of the images; users' own: the .npz file (see jkd.data.read_pairs), or the
    # folder that TFDS prepared sets in.
    c.data_dir = ""
    c.images = "digits8x8"  # of digit_halves: or mnist5k, mnist
    c.text, c.variants, c.words = "tokens", 20, 3  # of fashion_text: or sentences; texts a class, words a text
    c.tfds, c.columns = "", ("image", "text", "label")  # of tfds: the set, and its features that are the columns
    c.examples = 0  # of sets that are made, or of images that are read; 0: the set's own number
    c.private, c.noise, c.clusters, c.seed = 4, 0.3, 6, 0  # of factors and clusters
    # Of each seed, where the set does not say so itself; queries are never searched.
    c.query_examples, c.validation_examples = 397, 200
    c.train_examples = 0  # of what is searched, to train on; 0: all
    # For plans without the data: what they look like.
    c.blank, c.num_examples, c.num_classes, c.several = False, 1797, 10, False
    c.first_shape, c.second_shape, c.masked = (32,), (32,), False
    c.update(changes)
    return c


def load_pairs(config: ConfigDict) -> PairTask:
    """Loads the pairs of a config, or stand-ins of the same shape where `data.blank` is set (for plans).

    Raises:
      UserError: if they cannot be loaded, or a part would have no rows or less than a batch.
    """
    c, loader = config.data, {"workers": config.loop.workers, "prefetch": config.loop.prefetch}
    given: Mapping[str, np.ndarray] = {}
    if c.blank:
        pool = _blank(c)
    elif c.name in FILES:
        pool, given = made.read_pairs(_file(c))
        if not {"train", "query"} <= set(given):
            raise UserError(f"'split' of {c.data_dir} must name training and query rows, got {', '.join(given)}.")
    elif c.name == "tfds":
        from jkd.data.pair_records import load_record_pairs

        pool = load_record_pairs(c.tfds, tuple(c.columns), c.data_dir or None)
    elif c.name in SETS:
        pool = SETS[c.name](c)
    else:
        raise unknown("data.name", c.name, (*SETS, *FILES, "tfds"))
    _check_sizes(c, len(pool), bool(given))
    task = PairTask(c, pool, given, loader)
    if task.sizes["train"] < config.batch_size:
        raise UserError(
            f"There are {task.sizes['train']} training pairs, less than a batch: batch_size is {config.batch_size}."
        )
    return task


def _file(c: ConfigDict) -> str:
    if not c.data_dir:
        raise UserError(
            f"data.name={c.name!r} reads features from a file of yours: set data.data_dir to a .npz with the arrays "
            "first, second, label and split."
        )
    return c.data_dir


def _blank(c: ConfigDict) -> data.Examples:
    columns: dict[str, tuple[tuple[int, ...], Any]] = {
        "first": (tuple(c.first_shape), np.float32),
        "second": (tuple(c.second_shape), np.float32),
    }
    if c.masked:
        columns["second_mask"] = (tuple(c.second_shape)[:1], np.bool_)
    return data.blank_columns(c.num_examples, columns, c.num_classes, several=c.several, name=c.name)


def _check_sizes(c: ConfigDict, rows: int, given: bool) -> None:
    sizes = {name: c[name] for name in ("query_examples", "validation_examples", "train_examples", "examples")}
    taken = (0 if given else c.query_examples) + c.validation_examples
    if min(sizes.values()) < 0 or taken >= rows or not (given or c.query_examples):
        raise UserError(
            f"data.query_examples={c.query_examples} (at least 1) and "
            f"data.validation_examples={c.validation_examples} must leave some of the {rows} pairs to train on and to "
            f"search; none may be negative: {sizes}."
        )
