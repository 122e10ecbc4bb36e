"""What a trained method gives to be searched: how queries become codes or vectors, and what there is to find."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from experiments.pairs import SIDES, PairTask
from jkd import data
from jkd.data import images
from jkd.data.captions import label_captions
from jkd.data.sentences import sentence_encoder
from jkd.data.words import token_vectors
from jkd.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg")
FILES = (*IMAGES, ".npy")


class Shown(NamedTuple):
    """An item as a person sees it: pixels, uint8[height, width, channels] or None, and words (perhaps none)."""

    picture: np.ndarray | None
    text: str


class Searcher(Protocol):
    """What `searcher(config, stage)` of a method's module returns; `consts` and `published` are those of one seed.

    Attributes:
      sides: in order, what each of them is: "image", "text" or "features".
      binary: whether encodings are scores whose signs are a code; else their cosine counts.
    """

    @property
    def sides(self) -> Mapping[str, str]:
        """See above."""

    @property
    def binary(self) -> bool:
        """See above."""

    def source(self, consts: Any, part: str) -> data.Source:
        """The rows of a part in order: "database", what is searched, or "query", rows that no one trained on."""

    def read(self, side: str, query: str) -> Mapping[str, np.ndarray]:
        """A batch of one row that is a file's or a text's."""

    def encode(self, side: str, published: Any, consts: Any, batch: Mapping[str, Any]) -> jax.Array:
        """[rows, numbers] of one side of a batch, or [rows, items, numbers] where a row has several; traced."""

    def show(self, side: str, consts: Any, part: str, row: int, item: int) -> Shown:
        """An item of a part."""


@dataclasses.dataclass(frozen=True, eq=False)
class PairSearcher:
    """Of methods that hash pairs.

    Attributes:
      task: the pairs.
      scores: `scores(published, consts, batch) -> {side: [batch, bits]}`, as evaluators take it.
      batch_size: rows at a time.
    """

    task: PairTask
    scores: Callable[[Any, Any, Mapping[str, Any]], Mapping[str, jax.Array]]
    batch_size: int
    binary: bool = True

    @functools.cached_property
    def sides(self) -> dict[str, str]:
        """By what the columns look like."""
        return {side: self._kind(side) for side in SIDES}

    def _kind(self, side: str) -> str:
        if f"{side}_mask" in self.task.shapes or (self.task.config.name == "fashion_text" and side == "second"):
            return "text"
        return "image" if self.picture_shape(side) else "features"

    def picture_shape(self, side: str) -> tuple[int, ...]:
        """Of a side's pixels; () where it has none. Halves of images are flat."""
        c, shape = self.task.config, self.task.shapes[side]
        if c.name == "digit_halves":
            return _half_shape(c.images, shape[0])
        return tuple(shape) if len(shape) == 3 and shape[-1] in images.MODES else ()

    def source(self, consts: Any, part: str) -> data.Source:
        """The rows of a part in order."""
        return self.task.part(consts, part, self.batch_size)

    def read(self, side: str, query: str) -> dict[str, np.ndarray]:
        """A batch of one row; its other side is zeros.

        Raises:
          UserError: for a file or a text that the side cannot be.
        """
        blank = self.task.pool.read(np.zeros(1, np.int32))
        batch = {name: np.zeros_like(column) for name, column in blank.items()}
        masks = {name: np.ones_like(column) for name, column in blank.items() if name.endswith("_mask")}
        own = self._text(side, query) if self.sides[side] == "text" else {side: self._file(side, query)}
        return {**batch, **masks, **own, "index": np.zeros(1, np.int32)}

    def _text(self, side: str, text: str) -> dict[str, np.ndarray]:
        c, shape = self.task.config, self.task.shapes[side]
        if c.name != "fashion_text":
            raise UserError(f"The texts of {c.name!r} came as vectors: how to make more of them is not known here.")
        if c.text == "sentences":
            return {side: sentence_encoder().embed([text])}
        vectors, mask = token_vectors().embed([text], shape[0])
        return {side: vectors, f"{side}_mask": mask}

    def _file(self, side: str, name: str) -> np.ndarray:
        path, shape = pathlib.Path(name), self.task.shapes[side]
        wanted = f"an .npy file of numbers {list(shape)}"
        if self.picture_shape(side):
            wanted += " or a .png or .jpg file"
        if not path.is_file() or path.suffix.lower() not in FILES:
            raise UserError(f"The query of side {side!r} must be {wanted}, got {name!r}.")
        if path.suffix.lower() in IMAGES:
            return self._image(side, path, wanted)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read as a numpy array; it must be {wanted}.") from error
        if (
            not isinstance(array, np.ndarray)
            or array.dtype.kind not in "fiu"
            or array.shape not in (shape, (1, *shape))
        ):
            raise UserError(f"{path} must be {wanted}.")
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds numbers that are not finite.")
        return array.astype(np.float32).reshape(1, *shape)

    def _image(self, side: str, path: pathlib.Path, wanted: str) -> np.ndarray:
        """Pixels in [0, 1], resized; of a whole image where the side is a half, that half."""
        shape = self.picture_shape(side)
        if not shape:
            raise UserError(f"Side {side!r} of this run has no pixels: the query must be {wanted}.")
        halves = self.task.config.name == "digit_halves"
        height, width, channels = shape[0] * (2 if halves else 1), shape[1], shape[2]
        try:
            image = images.decode(path.read_bytes(), channels)
        except OSError as error:
            raise UserError(f"{path} cannot be read as an image.") from error
        if halves and image.size == (width, shape[0]):  # a half already
            height = shape[0]
        pixels = images.to_array(image.resize((width, height)) if image.size != (width, height) else image)
        if height != shape[0]:
            pixels = pixels[: shape[0]] if side == SIDES[0] else pixels[shape[0] :]
        return (pixels.astype(np.float32) / 255).reshape(1, *self.task.shapes[side])

    def encode(self, side: str, published: Any, consts: Any, batch: Mapping[str, Any]) -> jax.Array:
        """The scores of a side's code."""
        return self.scores(published, consts, batch)[side]

    def show(self, side: str, consts: Any, part: str, row: int, item: int = 0) -> Shown:
        """The pixels of a side, or all of an image of which it is a half; a caption."""
        number = int(np.asarray(consts["rows"][part])[row])
        columns = {name: column[0] for name, column in self.task.pool.read(np.array([number])).items()}
        label = columns["label"]
        told = f"label {label}" if np.ndim(label) == 0 else f"labels {np.flatnonzero(label).tolist()}"
        if self.task.config.name == "fashion_text" and self.sides[side] == "text":
            c = self.task.config
            captions = label_captions("fashion_mnist", self.task.pool.labels, variants=c.variants, words=c.words)
            return Shown(None, f"{captions.texts[captions.chosen[number]]} ({told})")
        shape = self.picture_shape(side)
        if not shape:
            return Shown(None, told)
        pieces = SIDES if self.task.config.name == "digit_halves" else (side,)
        pixels = np.concatenate([columns[name].reshape(shape) for name in pieces])
        return Shown(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8), told)


def _half_shape(name: str, numbers: int) -> tuple[int, int, int]:
    """Height, width and channels of a half of a square image of one channel that is so many numbers."""
    width = round((2 * numbers) ** 0.5)
    if width * width != 2 * numbers:
        raise UserError(f"Images of {name!r} are not square.")
    return width // 2, width, 1
