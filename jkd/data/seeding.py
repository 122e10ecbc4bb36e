"""Host-side random streams whose values never change: MT19937, frozen by numpy's compatibility policy."""

import zlib

import numpy as np

from jkd.errors import UserError


def random_state(purpose: str, seed: int, counter: int = 0) -> np.random.RandomState:
    """Returns the stream of (`purpose`, `seed`, `counter`): the same on every machine and numpy version.

    numpy freezes `RandomState` (unlike `Generator`), so a split or a shuffle drawn from it stays what it was.
    Different purposes are independent: an epoch's order does not repeat the split made with the same seed.

    Args:
      purpose: a short name of what is drawn.
      seed: 0 <= seed < 2**64.
      counter: 0 <= counter < 2**64, an epoch or a position in the stream of examples.

    Raises:
      UserError: if `seed` or `counter` is out of range.
    """
    for name, value in (("seed", seed), ("counter", counter)):
        if not 0 <= value < 2**64:
            raise UserError(f"{name} must be in [0, 2**64), got {value}.")
    words = [zlib.crc32(purpose.encode())]
    for value in (int(seed), int(counter)):
        words += [value & 0xFFFFFFFF, value >> 32]
    return np.random.RandomState(np.array(words, np.uint32))


def epoch_order(seed: int | None, epoch: int, size: int) -> np.ndarray:
    """Returns the order of `size` rows in an epoch, int32[size]: a permutation; 0..size-1 for seed None."""
    if seed is None:
        return np.arange(size, dtype=np.int32)
    return random_state("epoch order", seed, epoch).permutation(size).astype(np.int32)
