"""What every generator and every discriminator returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Generated(NamedTuple):
    """Images of one batch of latents.

    Attributes:
      images: about [-1, 1], float32 at least, whatever the model computes in; unbounded where the model says so.
      features: taps by name, in the order of the forward pass, in the compute dtype. Convolutional models: the
        maps at each resolution, "4x4", "8x8", ...; MLP: "hidden1" ... "hiddenN".
    """

    images: Float[Array, "batch height width channels"]
    features: dict[str, Float[Array, "batch ..."]]


class Judged(NamedTuple):
    """Logits of one batch of images, higher for what looks real.

    Attributes:
      logits: one an image, unbounded; float32 at least.
      features: taps by name, in the order of the forward pass, in the compute dtype, named as in `Generated`.
    """

    logits: Float[Array, " batch"]
    features: dict[str, Float[Array, "batch ..."]]
