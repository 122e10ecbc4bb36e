"""Few-shot adaptation of generators (Zhao, Ding, Huang and Cheung, CVPR 2022): dual contrastive learning and others.

    python -m experiments.train --config configs/fewshot_dcl.py --workdir runs/fewshot_dcl

Variants:
  default  scikit-learn's digits to inverted ones, 10 shots, dense networks, 2,000 steps.
  smoke    the same code in seconds.
  fashion  MNIST digits to 10 pieces of clothing, dense networks.
  babies, sunglasses, sketches
           faces at 256x256 to 10 shots of each, from a StyleGAN2 (config-f) trained on FFHQ, with a discriminator of
           patches: the authors' setting. --config.start.workdir=WORKDIR takes source and features from another run.

The large sets are to be prepared as array_record with features "image" and "label" (`data.data_dir`), and
`features.init_from` is to name the weights that images are compared by.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import gan_settings

FACES = ("babies", "sunglasses", "sketches")
VARIANTS = ("default", "smoke", "fashion", *FACES)


def arm(**changes: Any) -> ConfigDict:
    """What is added to fine-tuning; weights of 0 leave a term out."""
    config = ConfigDict()
    config.lr = 1e-3
    config.cl1, config.cl2 = 0.0, 0.0  # contrasts of generator and of discriminator features
    config.cdc = 0.0  # cross-domain consistency, of a mean over pairs
    config.ewc = 0.0  # elastic weight consolidation of the generator
    config.freeze_d = ()  # regexes on paths of the discriminator's parameters
    config.ada = False  # adaptive augmentation of what the discriminator sees
    config.update(changes)
    return config


def get_config(variant: str = "default") -> ConfigDict:
    config = gan_settings.base("fewshot_dcl")
    config.seeds = 5
    config.game.update({"steps": 5000, "drift": 0.0})
    config.source = ConfigDict({"lr": 1e-3})
    config.target = ConfigDict({"name": "", "transform": "invert", "shots": 10})
    config.target.train_split, config.target.test_split = "train", "test"  # where a name is given
    config.adapt = ConfigDict({"steps": 2000, "batch_size": 10, "every": 250, "tau": 0.07, "decay": 0.98})
    config.adapt.patch_layer = ""  # a feature of the discriminator, whose positions are judged one by one
    config.adapt.anchor_every, config.adapt.anchor_sigma = 4, 0.1  # steps of whole images, near fixed latents
    config.adapt.fisher_images, config.adapt.ada_images = 500, 5000
    config.arms = ConfigDict(
        {
            "finetune": arm(),
            "cl1": arm(cl1=2.0),
            "cl2": arm(cl2=0.5),
            "dcl": arm(cl1=2.0, cl2=0.5),
            "cdc": arm(cdc=1000.0),
            "ewc": arm(ewc=1000.0),
            "freeze_d": arm(freeze_d=("^whole/hidden1/",)),
            "ada": arm(ada=True),
        }
    )
    if variant == "smoke":
        gan_settings.smoke(config)
        config.adapt.update({"steps": 4, "every": 2, "batch_size": 4, "fisher_images": 8})
        config.target.shots = 4
    elif variant == "fashion":
        gan_settings.fashion(config)
        config.seeds = 3
        config.data.name, config.data.num_examples, config.data.validation_examples = "mnist5k", 3000, 500
        config.data.train_split, config.data.test_split = "train+test[:2000]", "test[2000:]"
        config.target.update({"name": "fashion_mnist", "transform": "none"})
        config.target.train_split, config.target.test_split = "train[:10000]", "test[:2000]"
        config.features.epochs, config.judge.neighbours = 3.0, 500
        config.generator.update({"latent_dim": 64, "hidden": (256, 256)})
        config.discriminator.hidden = (256, 256)
    elif variant in FACES:
        large(config, variant)
    return config


def large(config: ConfigDict, name: str) -> None:
    """The authors' setting: faces at 256x256."""
    gan_settings.photos(config, "ffhq", 256, 70000)
    gan_settings.stylegan2(config, 800_000)
    config.generator.fmap_base = config.discriminator.fmap_base = 16384
    config.source.lr = 0.002
    config.target.update({"name": f"ffhq_{name}", "transform": "none"})
    config.adapt.update({"steps": 5000, "batch_size": 4, "every": 500, "patch_layer": "64x64"})
    del config.arms["ada"]
    config.arms.ada = arm(ada=True)
    config.arms.freeze_d.freeze_d = ("^whole/trunk/(from_rgb|conv|down|shortcut)(256|128)/",)
    config.adapt.ada_images = 500_000
    for one in config.arms.values():
        one.lr = 0.002
    config.arms.ewc.ewc = 5e8
