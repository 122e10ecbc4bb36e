"""Fingerprinted generators (Yu, Skripniuk, Chen, Davis and Fritz, ICLR 2022).

    python -m experiments.train --config configs/gan_fingerprinting.py --workdir runs/gan_fingerprinting

Variants:
  default    scikit-learn's digits, dense networks, 16 bits, 3,000 steps.
  smoke      the same code in seconds.
  fashion    Fashion-MNIST, dense networks, 64 and 128 bits in 784 pixels.
  celeba128, bedroom128, cat256
             the authors' setting: StyleGAN2 (config-e), 128 bits, and 32 to 512 bits on celeba128.

The large sets are to be prepared as array_record with features "image" and "label" (`data.data_dir`), and
`features.init_from` is to name the weights that images are compared by.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import gan_settings

PHOTOS = {"celeba128": 30000, "bedroom128": 30000, "cat256": 50000}
VARIANTS = ("default", "smoke", "fashion", *PHOTOS)


def arm(kind: str = "fingerprint", **changes: Any) -> ConfigDict:
    """One generator."""
    config = ConfigDict()
    config.kind = kind  # plain: without a fingerprint; finetuned: an instance of `start`, trained on
    config.lr = 1e-3
    config.bits = 16
    config.weights = (1.0, 1.0, 2.0, 2.0)  # of the terms: adversarial, latent, bits, constant
    config.immunize = ()  # perturbations as "NAME:STRENGTH": the decoder learns from images after one of them, or none
    config.start, config.steps_share = "", 0.25  # of finetuned: the arm, and steps as a share of its training
    config.update(changes)
    return config


def get_config(variant: str = "default") -> ConfigDict:
    config = gan_settings.base("gan_fingerprinting")
    config.game.update({"steps": 3000, "drift": 0.0})
    config.generator.style_dim = 64
    config.discriminator.hidden = (128, 128)
    config.decoder = ConfigDict({"model": "mlp", "hidden": (256, 256), "fmap_base": 8192, "fmap_max": 512})
    config.users, config.false_positive_rate = 100, 0.01  # whom images are attributed to, and when one is accused
    config.perturbations = ("noise:0.05", "noise:0.1", "blur:0.5", "blur:1", "jpeg:90", "jpeg:50", "crop:0.9")
    arms = {
        "plain": arm("plain"),
        "full": arm(),
        "no_constant": arm(weights=(1.0, 1.0, 2.0, 0.0)),
        "no_bits": arm(weights=(1.0, 1.0, 0.0, 2.0)),
        "no_latent": arm(weights=(1.0, 0.0, 2.0, 2.0)),
        "bits32": arm(bits=32),
        "immunized": arm(immunize=("noise:0.1", "blur:0.5", "jpeg:90", "crop:0.9")),
        "finetuned": arm("finetuned", start="full"),
    }
    config.arms = ConfigDict(arms)
    if variant == "smoke":
        gan_settings.smoke(config)
        config.decoder.hidden = (16,)
    elif variant == "fashion":
        gan_settings.fashion(config)
        config.game.steps = 2000
        config.generator.update({"latent_dim": 64, "hidden": (256, 256), "style_dim": 128})
        config.discriminator.hidden, config.decoder.hidden = (256, 256), (512, 512)
        config.arms = ConfigDict({"plain": arm("plain"), "bits64": arm(bits=64), "bits128": arm(bits=128)})
    elif variant in PHOTOS:
        large(config, variant)
    return config


def large(config: ConfigDict, name: str) -> None:
    """The authors' StyleGAN2 on a set of photos."""
    gan_settings.photos(config, name[:-3], int(name[-3:]), PHOTOS[name])
    gan_settings.stylegan2(config, 250_000)
    config.batch_size, config.generator.style_mixing, config.game.penalty_weight = 16, 0.0, 50.0
    config.decoder = ConfigDict({"model": "stylegan2", "hidden": (0,), "fmap_base": 8192, "fmap_max": 512})
    config.users, config.false_positive_rate = 1000, 1e-9
    config.perturbations = ("noise:0.05", "noise:0.1", "blur:1", "blur:2", "jpeg:90", "jpeg:50", "crop:0.8", "crop:0.6")
    for one in config.arms.values():
        one.lr, one.bits = 0.002, 128
    del config.arms["bits32"]
    if name == "celeba128":
        for bits in (32, 64, 256, 512):
            config.arms[f"bits{bits}"] = arm(bits=bits, lr=0.002)
        config.false_positive_rate = 1e-6  # 32 bits cannot show less
