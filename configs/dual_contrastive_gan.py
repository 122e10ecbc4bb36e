"""Dual contrastive loss and attention (Yu et al., ICCV 2021), beside the adversarial losses it is compared with.

    python -m experiments.train --config configs/dual_contrastive_gan.py --workdir runs/dual_contrastive_gan

Variants:
  default      scikit-learn's digits, dense networks, 4,000 steps: all losses.
  smoke        the same code in seconds.
  fashion      Fashion-MNIST, DCGAN: logistic, dual and saturating dual.
  patches      32x32 pieces of photos, a small StyleGAN2: without attention, and with each form of it.
  ffhq256, bedroom256, church256, horse256, clevr256
               StyleGAN2 (config-e) at 256x256: the dual loss, alone and with patchwise attention at 32x32.
  celeba128, animal128
               30,000 faces and as many of animals at 128x128: all forms of attention, in either network.

The large sets are to be prepared as array_record with features "image" and "label" (`data.data_dir`), and
`features.init_from` is to name the weights that images are compared by. Lengths are ours: the paper's text names none.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import gan_settings

PHOTOS = {"ffhq256": 70000, "bedroom256": 200000, "church256": 126227, "horse256": 200000, "clevr256": 100000}
LIMITED = {"celeba128": 30000, "animal128": 30000}
VARIANTS = ("default", "smoke", "fashion", "patches", *PHOTOS, *LIMITED)


def arm(loss: str = "logistic", **changes: Any) -> ConfigDict:
    """What one pair of networks is trained by."""
    config = ConfigDict()
    config.loss = loss  # logistic, hinge, least_squares, wgan, relativistic, dual or dual_saturating
    config.lr = 1e-3
    config.penalty, config.penalty_weight = "", 1.0  # in place of the game's, where it is named
    config.generator_attention, config.discriminator_attention = (), ()  # beside the networks' own
    config.update(changes)
    return config


def losses(**changes: Any) -> dict[str, ConfigDict]:
    """All losses, by name."""
    arms = {name: arm(name, **changes) for name in ("logistic", "dual", "dual_saturating")}
    arms |= {name: arm(name, **changes) for name in ("hinge", "least_squares", "relativistic")}
    return arms | {"wgan_gp": arm("wgan", penalty="one_centered", penalty_weight=10.0, **changes)}


def attentive(resolution: int, **changes: Any) -> dict[str, ConfigDict]:
    """The forms of attention that the paper compares, in either network."""
    kinds = {"global": "self", "dynamic": "dynamic", "tokens": "tokens", "patchwise": "patchwise"}
    arms = {f"{name}_g": arm(generator_attention=(f"{resolution}:{kind}",), **changes) for kind, name in kinds.items()}
    arms |= {
        f"{name}_d": arm(discriminator_attention=(f"{resolution}:{kind}",), **changes)
        for kind, name in (*kinds.items(), ("reference", "reference"))
    }
    both = (f"{resolution}:patchwise",), (f"{resolution}:reference",)
    both_arms = {
        f"{loss}_attention": arm(loss, generator_attention=both[0], discriminator_attention=both[1], **changes)
        for loss in ("logistic", "dual")
    }
    return arms | both_arms


def large(config: ConfigDict, name: str, examples: int) -> None:
    """The paper's StyleGAN2 on a set of photos."""
    side = int(name[-3:])
    gan_settings.photos(config, name[:-3], side, examples)
    gan_settings.stylegan2(config, 800_000)
    rate = {"lr": 0.002}
    arms = {loss: arm(loss, **rate) for loss in ("logistic", "dual", "dual_saturating")}
    if name in LIMITED:
        arms |= attentive(32, **rate)
    else:
        arms["dual_patchwise"] = arm("dual", generator_attention=("32:patchwise",), **rate)
    config.arms = ConfigDict(arms)


def get_config(variant: str = "default") -> ConfigDict:
    config = gan_settings.base("dual_contrastive_gan")
    config.seeds = 5
    config.arms = ConfigDict(losses())
    if variant == "smoke":
        gan_settings.smoke(config)
    elif variant == "fashion":
        gan_settings.fashion(config)
        config.seeds = 3
        config.generator = gan_settings.generator("dcgan", latent_dim=64, width=16)
        config.discriminator = gan_settings.discriminator("dcgan", width=16)
        config.game = gan_settings.game(1500, penalty_every=4)
        config.arms = ConfigDict({loss: arm(loss) for loss in ("logistic", "dual", "dual_saturating")})
    elif variant == "patches":
        gan_settings.patches(config)
        config.seeds = 3
        config.batch_size, config.eval_every = 16, 250
        config.game = gan_settings.game(500, penalty_weight=0.5, penalty_every=16, decay=0.98)
        rate = {"lr": 0.002}
        arms = {loss: arm(loss, **rate) for loss in ("logistic", "dual")}
        config.arms = ConfigDict(arms | attentive(16, **rate))
    elif variant in VARIANTS[1:]:
        large(config, variant, {**PHOTOS, **LIMITED}[variant])
    return config
