"""Pictures and captions to be searched for each other: what `experiments.search` asks of a method that embeds them."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.captions import CaptionTask, Inputs
from experiments.embedding_measures import encode_images, encode_texts
from experiments.searchers import IMAGES, Shown
from jkd import data
from jkd.data import images
from jkd.errors import UserError, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionSearcher:
    """What is asked and searched are test pictures and their captions.

    Attributes:
      task: the data.
      model: an `MHSAN`.
      inputs: how batches come to it.
      batch_size: pictures at a time.
    """

    task: CaptionTask
    model: Any
    inputs: Inputs
    batch_size: int
    binary: bool = False

    @functools.cached_property
    def sides(self) -> dict[str, str]:
        """Pictures are pixels or features."""
        return {"image": "image" if self._row["image"].dtype == np.uint8 else "features", "text": "text"}

    @functools.cached_property
    def _row(self) -> dict[str, np.ndarray]:
        return self.task.pool.read(np.zeros(1, np.int32))

    def source(self, consts: Any, part: str) -> data.Source:
        """The test rows, for either part."""
        return self.task.part(consts, "test", self.batch_size)

    def read(self, side: str, query: str) -> dict[str, np.ndarray]:
        """A batch of one row, of a file or of words.

        Raises:
          UserError: for a file or words that the side cannot be.
        """
        blank = {name: np.zeros_like(column) for name, column in self._row.items()}
        own = self._text(query) if side == "text" else {"image": self._file(pathlib.Path(query))}
        return {**blank, **own, "index": np.zeros(1, np.int32)}

    def _text(self, query: str) -> dict[str, np.ndarray]:
        """The words as each of the captions."""
        if self.task.vocabulary is None:
            raise UserError("The captions of this run came as numbers: which words they are is not known here.")
        known, said = self.task.vocabulary.words, query.split()
        for word in said:
            if word not in known:
                raise unknown("word", word, known[1:])
        length = self.task.shapes["mask"][1]
        if not 1 <= len(said) <= length:
            raise UserError(f"The query must be of 1 to {length} words, got {len(said)}.")
        words = np.zeros(self._row["words"].shape, np.int32)
        words[..., : len(said)] = [known.index(word) for word in said]
        return {"words": words, "mask": words > 0}

    def _file(self, path: pathlib.Path) -> np.ndarray:
        like = self._row["image"]
        pixels, shape = self.sides["image"] == "image", like.shape[1:]
        wanted = f"a {' or '.join(IMAGES)} file" if pixels else f"an .npy file of numbers {list(shape)}"
        try:
            if pixels and path.suffix.lower() in IMAGES:
                image = images.decode(path.read_bytes(), shape[-1])
                return images.to_array(image.resize((shape[1], shape[0])))[None]
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read; the query must be {wanted}.") from error
        if pixels or found.shape not in (shape, (1, *shape)) or found.dtype.kind != "f" or not np.isfinite(found).all():
            raise UserError(f"{path} must be {wanted}, finite.")
        return found.reshape(like.shape).astype(like.dtype)

    def encode(self, side: str, published: Any, consts: Any, batch: Mapping[str, Any]) -> jax.Array:
        """One vector a picture, or one for each of its captions."""
        if side == "image":
            return encode_images(self.model, self.inputs, published, batch).vector
        vectors = encode_texts(self.model, self.inputs, published, consts, batch).vector
        return vectors.reshape(*batch["mask"].shape[:2], -1)

    def show(self, side: str, consts: Any, part: str, row: int, item: int = 0) -> Shown:
        """A picture (how large its features are, where it has no pixels) with its first caption, or a caption."""
        number = np.asarray(consts["rows"]["test"])[[row]]
        columns = {name: column[0] for name, column in self.task.test.read(number).items()}
        text = self._words(columns["words"][item], int(number[0]))
        if side == "text":
            return Shown(None, text)
        pixels = columns["image"]
        if pixels.dtype == np.uint8:
            return Shown(pixels, text)
        sizes = np.linalg.norm(pixels.astype(np.float32), axis=-1)
        sizes = sizes if sizes.ndim == 2 else sizes[None]
        return Shown(np.rint(255 * sizes / max(float(sizes.max()), 1e-12)).astype(np.uint8)[..., None], text)

    def _words(self, numbers: np.ndarray, row: int) -> str:
        if self.task.vocabulary is None or numbers.ndim > 1:
            return f"row {row}"
        return self.task.vocabulary.text(numbers)
