"""Generative adversarial networks: their networks, losses, penalties and training; adaptation, fingerprints, health."""

from jkd.gan.adaptation import (
    anchored_latents,
    distance_consistency_loss,
    ewc_penalty,
    fisher_information,
    freeze,
    select_layer,
)
from jkd.gan.attention import ReferenceAttention, SelfAttention2D, TokenAttention, dot_attention
from jkd.gan.augmentation import ada_update, augment_with_probability
from jkd.gan.contrastive import discriminator_contrastive_loss, generator_contrastive_loss
from jkd.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from jkd.gan.fingerprints import (
    Attribution,
    FingerprintLosses,
    attribute,
    bake_fingerprint,
    fingerprint_losses,
    sample_fingerprints,
)
from jkd.gan.health import diversity_ratio, duplicates, logit_separation, saturation, verdict
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
from jkd.gan.mlp import MLPDiscriminator, MLPEncoder, MLPGenerator
from jkd.gan.modulation import demodulation, modulated_conv, modulated_kernel
from jkd.gan.outputs import Generated, Judged
from jkd.gan.patch_attention import DynamicFilter, PatchwiseSelfAttention
from jkd.gan.penalties import (
    PathLengthPenalty,
    one_centered_gradient_penalty,
    path_length_penalty,
    r1_penalty,
    zero_centered_gradient_penalty,
)
from jkd.gan.players import Players, as_uint8, from_uint8, references_of
from jkd.gan.stylegan2 import StyleGAN2Generator
from jkd.gan.stylegan2_discriminator import StyleGAN2Discriminator, StyleGAN2Encoder
from jkd.gan.styles import mix_styles, truncate
from jkd.gan.training import GanState, GanStep, Penalty, average_decay, create_gan_state, lazy_adam

__all__ = [
    "Attribution",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DynamicFilter",
    "FingerprintLosses",
    "GanState",
    "GanStep",
    "Generated",
    "Judged",
    "MLPDiscriminator",
    "MLPEncoder",
    "MLPGenerator",
    "PatchwiseSelfAttention",
    "PathLengthPenalty",
    "Penalty",
    "Players",
    "ReferenceAttention",
    "SelfAttention2D",
    "StyleGAN2Discriminator",
    "StyleGAN2Encoder",
    "StyleGAN2Generator",
    "TokenAttention",
    "ada_update",
    "anchored_latents",
    "as_uint8",
    "attribute",
    "augment_with_probability",
    "average_decay",
    "bake_fingerprint",
    "contrastive_half",
    "create_gan_state",
    "demodulation",
    "discriminator_contrastive_loss",
    "distance_consistency_loss",
    "diversity_ratio",
    "dot_attention",
    "drift_penalty",
    "dual_contrastive_d_loss",
    "dual_contrastive_g_loss",
    "duplicates",
    "ewc_penalty",
    "fingerprint_losses",
    "fisher_information",
    "freeze",
    "from_uint8",
    "generator_contrastive_loss",
    "hinge_d_loss",
    "hinge_g_loss",
    "lazy_adam",
    "least_squares_d_loss",
    "least_squares_g_loss",
    "logit_separation",
    "mix_styles",
    "modulated_conv",
    "modulated_kernel",
    "nonsaturating_logistic_d_loss",
    "nonsaturating_logistic_g_loss",
    "one_centered_gradient_penalty",
    "path_length_penalty",
    "r1_penalty",
    "references_of",
    "relativistic_logistic_d_loss",
    "relativistic_logistic_g_loss",
    "sample_fingerprints",
    "saturation",
    "select_layer",
    "truncate",
    "verdict",
    "wgan_d_loss",
    "wgan_g_loss",
    "zero_centered_gradient_penalty",
]
