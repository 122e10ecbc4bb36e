"""What is done with the styles of a generator: they are mixed, or drawn to their mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jkd.checks import check_share
from jkd.errors import UserError
from jkd.gan.stylegan2 import Styles


def mix_styles(key: Key[Array, ""], styles_a: Styles, styles_b: Styles, probability: float = 0.9) -> Styles:
    """With this probability an image's layers take the styles of b from a random layer (not the first) on.

    Images draw for themselves. With fewer than two layers nothing is mixed.

    Raises:
      UserError: on shapes that differ, or a probability known to be outside [0, 1].

    Reference: Karras, Laine and Aila, A Style-Based Generator Architecture for GANs, CVPR 2019.
    """
    check_share("probability", probability)
    if styles_a.shape != styles_b.shape:
        raise UserError(
            f"styles_a and styles_b must have the same shape, got {list(styles_a.shape)} and {list(styles_b.shape)}."
        )
    batch, layers = styles_a.shape[:2]
    key_mixed, key_layer = jax.random.split(key)
    mixed = jax.random.bernoulli(key_mixed, probability, (batch, 1, 1))
    cut = jax.random.randint(key_layer, (batch, 1, 1), 1, max(layers, 2))
    return jnp.where(mixed & (jnp.arange(layers).reshape(1, -1, 1) >= cut), styles_b, styles_a)


def truncate(styles: Styles, mean: Float[Array, " style_dim"], psi: float | Float[Array, " layers"]) -> Styles:
    """Styles drawn towards their mean: mean + psi (w - mean); psi = 1 changes nothing, 0 gives the mean image.

    Args:
      styles: w.
      mean: of many styles.
      psi: one number, or one a layer.

    Reference: Karras, Laine and Aila, A Style-Based Generator Architecture for GANs, CVPR 2019.
    """
    mean = mean.reshape(1, 1, -1)
    return mean + jnp.asarray(psi, styles.dtype).reshape(1, -1, 1) * (styles - mean)
