"""What every model returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Outputs(NamedTuple):
    """Logits and named features of one batch.

    Attributes:
      logits: [batch, classes], unnormalized; float32 at least, whatever the model computes in.
      features: taps by name. Convolutional models: "stem" (what the first block receives), "block1" ...
        "blockN" (feature maps [batch, height, width, channels] after the last ReLU of each block, or as the
        model says) in the compute dtype. MLP: "hidden1" ... "hiddenN" [batch, units] in the compute dtype. All models:
        "pool", the penultimate vector [batch, channels], which the linear head reads, float32 at least.
    """

    logits: Float[Array, "batch classes"]
    features: dict[str, Float[Array, "batch ..."]]
