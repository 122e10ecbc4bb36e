"""Generative adversarial networks: losses, penalties and attention."""

from jkd.gan.attention import PatchwiseSelfAttention, ReferenceAttention, SelfAttention2D, dot_attention
from jkd.gan.contrastive import discriminator_contrastive_loss, generator_contrastive_loss
from jkd.gan.losses import (
    contrastive_half,
    drift_penalty,
    dual_contrastive_d_loss,
    dual_contrastive_g_loss,
    hinge_d_loss,
    hinge_g_loss,
    least_squares_d_loss,
    least_squares_g_loss,
    nonsaturating_logistic_d_loss,
    nonsaturating_logistic_g_loss,
    relativistic_logistic_d_loss,
    relativistic_logistic_g_loss,
    wgan_d_loss,
    wgan_g_loss,
)
from jkd.gan.penalties import (
    PathLengthPenalty,
    one_centered_gradient_penalty,
    path_length_penalty,
    r1_penalty,
    zero_centered_gradient_penalty,
)

__all__ = [
    "PatchwiseSelfAttention",
    "PathLengthPenalty",
    "ReferenceAttention",
    "SelfAttention2D",
    "contrastive_half",
    "discriminator_contrastive_loss",
    "dot_attention",
    "drift_penalty",
    "dual_contrastive_d_loss",
    "dual_contrastive_g_loss",
    "generator_contrastive_loss",
    "hinge_d_loss",
    "hinge_g_loss",
    "least_squares_d_loss",
    "least_squares_g_loss",
    "nonsaturating_logistic_d_loss",
    "nonsaturating_logistic_g_loss",
    "one_centered_gradient_penalty",
    "path_length_penalty",
    "r1_penalty",
    "relativistic_logistic_d_loss",
    "relativistic_logistic_g_loss",
    "wgan_d_loss",
    "wgan_g_loss",
    "zero_centered_gradient_penalty",
]
