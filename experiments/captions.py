"""Pictures with captions as a task: which sets there are, and who trains on what."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from jkd import data
from jkd.data.captioned import read_captioned
from jkd.data.scenes import Captioned, make_collages, make_scenes
from jkd.data.vocabulary import Vocabulary
from jkd.errors import UserError, unknown

MADE = ("scenes", "collages")
FILES = ("coco", "flickr30k", "file")  # features and captions that users bring
NAMES = (*MADE, *FILES)


@dataclasses.dataclass(frozen=True)
class CaptionTask:
    """The data of one config; a row is a picture with all its captions.

    Attributes:
      config: its `data` section.
      pool: the rows to train and validate on.
      test: those to test, which are others; where the set gives its parts, all rows, as `pool`.
      loader: how streamed sources read: {"workers", "prefetch"}.
      given: the rows of each part, where the set says so; else every seed draws its own training rows.
      words: how many there are where captions are numbers; 0 where they are vectors.
      table: the vectors of the numbers, where they are given and not learned.
      vocabulary: what the numbers mean, where that is known.
    """

    config: Any
    pool: data.Examples
    test: data.Examples
    loader: Any
    given: Mapping[str, np.ndarray]
    words: int
    table: np.ndarray | None
    vocabulary: Vocabulary | None

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one row, by column."""
        return {name: column.shape[1:] for name, column in self.pool.read(np.zeros(1, np.int32)).items()}

    @property
    def captions(self) -> int:
        """Of each picture."""
        return self.shapes["mask"][0]

    def split(self, key: jax.Array) -> dict[str, np.ndarray]:
        """Draws the rows {"train", "validation", "test"}, unless the set gives them; equal keys draw equal rows."""
        if self.given:
            return dict(self.given)
        seed = int(jax.random.randint(key, (), 0, cls.SPLIT_SEEDS))
        validation, rest = self.pool.split(self.config.validation_examples, seed=seed)
        return {"train": rest.indices, "validation": validation.indices, "test": self.test.indices}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The number of rows in each part; the same for every key."""
        return {name: len(index) for name, index in self.split(jax.random.key(0)).items()}

    def draw(self, key: jax.Array) -> dict[str, Any]:
        """The consts that `source` and `part` need, drawn from a stage's prepare key, and the vectors of words."""
        split, order = jax.random.split(key)
        found = {"rows": self.split(split), "order": jax.random.randint(order, (), 0, cls.SPLIT_SEEDS)}
        return found if self.table is None else found | {"table": self.table}

    def source(self, consts: Any, batch_size: int) -> data.Source:
        """The training batches of a stage whose consts hold `rows` and `order`."""
        part = self.pool.subset(np.asarray(consts["rows"]["train"]))
        return data.source(part, batch_size, seed=int(consts["order"]), **self.loader)

    def part(self, consts: Any, name: str, batch_size: int, limit: int = 0) -> data.Source:
        """The (first `limit`) "validation" or "test" rows in order."""
        whole = self.test if name == "test" else self.pool
        rows = np.asarray(consts["rows"][name])[: limit or None]
        return data.source(whole.subset(rows), batch_size, seed=None, **self.loader)


def check(config: ConfigDict) -> None:
    """Raises UserError for data that does not exist, before any is read."""
    c = config.data
    if c.name not in NAMES:
        raise unknown("data.name", c.name, NAMES)
    if c.name in FILES and not c.file and not c.blank:
        raise UserError(
            f"data.name={c.name!r} reads your features and captions: set data.file to an .npz, or a folder of .npy "
            "files, with the arrays image, words and split; nothing is downloaded."
        )
    if not c.blank and c.name in MADE and c.validation_examples < 1:
        raise UserError(f"data.validation_examples must be at least 1, got {c.validation_examples}.")


def load_task(config: ConfigDict) -> CaptionTask:
    """Makes or reads the data of a config, or stand-ins of the same shape where `data.blank` is set (for plans).

    Raises:
      UserError: if it cannot be made or read, or there is less than a batch.
    """
    check(config)
    c, loader = config.data, {"workers": config.loop.workers, "prefetch": config.loop.prefetch}
    if c.blank:
        return _blank(c, loader)
    if c.name in FILES:
        task = _read(c, loader)
    else:
        pool, test = _make(c, "train"), _make(c, "test")
        words = pool.vocabulary
        task = CaptionTask(c, pool.examples, test.examples, loader, {}, len(words), None, words)
    if task.sizes["train"] < config.batch_size:
        raise UserError(
            f"There are {task.sizes['train']} training rows, less than a batch: batch_size is {config.batch_size}."
        )
    return task


def _make(c: ConfigDict, part: str) -> Captioned:
    """All rows to train and validate on, or those to test."""
    count = c.test_examples if part == "test" else c.train_examples + c.validation_examples
    said = {"captions": c.captions, "fewest": c.fewest, "distractors": c.distractors}
    said |= {"distractor_words": c.distractor_words}
    if c.name == "scenes":
        sizes = {"grid": c.grid, "objects": c.objects, "types": c.types, "features": c.features, "noise": c.noise}
        return make_scenes(count, 2 * c.seed + (part == "test"), **sizes, **said)
    digits = data.load(c.digits, part, c.data_dir or None)
    return make_collages(digits, count, 2 * c.seed + (part == "test"), places=c.places, **said)


def _read(c: ConfigDict, loader: Any) -> CaptionTask:
    found = read_captioned(c.file)
    given = found.rows
    if c.train_examples and c.train_examples < len(given["train"]):
        given["train"] = given["train"][: c.train_examples]
    test = found.examples
    return CaptionTask(c, found.examples, test, loader, given, found.words, found.table, None)


def _blank(c: ConfigDict, loader: Any) -> CaptionTask:
    length = (c.captions, c.length)
    kinds: dict[str, Any] = {"image": (tuple(c.shape), np.float32 if c.features_given else np.uint8)}
    kinds |= {"words": (length, np.int32), "mask": (length, np.bool_)}
    pool, test = (data.blank_columns(n, kinds, 1, name=c.name) for n in (c.num_examples, max(c.num_examples // 10, 10)))
    rows = np.array_split(np.arange(c.num_examples, dtype=np.int32), [max(c.num_examples // 10, 10)])
    given = {"validation": rows[0], "train": rows[1], "test": np.arange(len(test), dtype=np.int32)}
    table = np.zeros((c.words, c.table_dim), np.float32) if c.table_dim else None
    return CaptionTask(c, pool, test, loader, given, c.words, table, None)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How a batch comes to the encoders.

    Attributes:
      mean: of pixels in [0, 1].
      std: likewise.
      cells: pixels are cut into so many squares a side, each a position of a map; 0: they stay an image.
      coordinates: whether every position also says where it is, in [-1, 1] down and across.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    cells: int
    coordinates: bool

    @classmethod
    def of(cls_, config: ConfigDict) -> "Inputs":
        """Those of a config.

        Raises:
          UserError: for a negative number, or a std that is not positive.
        """
        c = config.data
        if c.cells < 0 or not all(one > 0 for one in c.std):
            raise UserError(f"data.cells must be >= 0 and data.std > 0, got {c.cells} and {tuple(c.std)}.")
        return cls_(tuple(c.mean), tuple(c.std), c.cells, c.coordinates)

    def images(self, stored: jax.Array) -> jax.Array:
        """Stored pixels or features as an encoder takes them."""
        x = data.normalize(stored, self.mean, self.std) if stored.dtype == jnp.uint8 else stored.astype(jnp.float32)
        if self.cells:
            x = cut(x, self.cells)
        return with_coordinates(x) if self.coordinates else x

    @staticmethod
    def words(stored: jax.Array, consts: Any) -> jax.Array:
        """Numbers of words, or their vectors."""
        return consts["table"][stored] if "table" in consts else stored


def cut(images: jax.Array, cells: int) -> jax.Array:
    """[batch, height, width, channels] as a map [batch, cells, cells, numbers] of the pixels in each cell.

    Raises:
      UserError: if the cells do not divide the image.
    """
    batch, height, width, channels = images.shape
    if height % cells or width % cells:
        raise UserError(f"data.cells={cells} does not divide images of {height} x {width}.")
    tiles = images.reshape(batch, cells, height // cells, cells, width // cells, channels)
    return tiles.swapaxes(2, 3).reshape(batch, cells, cells, -1)


def with_coordinates(maps: jax.Array) -> jax.Array:
    """Maps [batch, h, w, channels] with two more channels: how far down and across, in [-1, 1]."""
    batch, height, width, _ = maps.shape
    down, across = (jnp.linspace(-1, 1, side, dtype=maps.dtype) for side in (height, width))
    where = jnp.stack(jnp.meshgrid(down, across, indexing="ij"), -1)
    return jnp.concatenate([maps, jnp.broadcast_to(where, (batch, height, width, 2))], -1)
