"""What a network and a narrower one of the same layers have in common."""

import math
from typing import NamedTuple

import numpy as np


class Channels(NamedTuple):
    """Which channels of a layer a narrower network has too, by their indices in the wide layer.

    Attributes:
      inputs: those that the kernel reads, increasing; None where it reads its output channels alone (a depthwise
        convolution) or there is no kernel (a normalization).
      outputs: those that the layer puts out, increasing.
    """

    inputs: np.ndarray | None
    outputs: np.ndarray


def narrowed(width: int, rate: float) -> int:
    """ceil(rate * width), at least 1; 0.07 * 100 counts as 7, not as 7.000000000000001."""
    return max(1, math.ceil(round(rate * width, 6)))
