"""Knowledge evolution (Taha et al., CVPR 2021): generations that inherit a sub-network and draw the rest anew.

    python -m experiments.train --config configs/knowledge_evolution.py --workdir runs/knowledge_evolution

Arms: `kels` splits channels, so that the inherited part is a slim network of its own, evaluated as `slim`; `wels`
splits single weights. Baselines: `long` trains once, for the epochs of all generations; each `born_again` generation
learns from the one before; `dsd` trains dense, with half of the weights, and dense again. The stages kels_g1, kels_g2,
.. are the generations, `kels` the last one.

Variants:
  default   scikit-learn's digits, 200 to train, an MLP 64-256-256-10, 6 generations of 60 epochs, 16 paired seeds: two
            minutes on 2 CPU cores.
  smoke     the same code in seconds.
  hard      1,000 rows of Fashion-MNIST, a convolutional net with batch norm, 5 generations of 20 epochs.
  cub200    the authors' recipe for fine-grained birds: ResNet-18 from scratch, batch 32, 5 generations of 200 epochs.
            cub200_resnet50, cub200_densenet169, cub200_googlenet, cub200_vgg11: their other networks.
  cifar100  ResNet-18 for 32x32 images by the same recipe.
  imagenet  ResNet-18 by ImageNet's own schedule, 3 generations.

The large ones need their data prepared as array_record (`data.data_dir`). VGG11 is that for 32x32 images here, with
one linear layer behind its last map's mean.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import settings

CUB = {f"cub200_{model}": model for model in ("resnet50", "densenet169", "googlenet", "vgg11")}
VARIANTS = ("default", "smoke", "hard", "cub200", *CUB, "cifar100", "imagenet")


def arm(kind: str, generations: int = 6, **changes: Any) -> ConfigDict:
    """What generations inherit, and how each is trained."""
    config = ConfigDict()
    config.kind = kind  # kels, wels, plain, born_again or dsd
    config.split_rate = 0.5  # share of the channels, or of the weights, that is inherited; of dsd, that stays
    config.generations = generations
    config.reset = "uniform"  # or normal: what is drawn anew, as PyTorch's default or as the first generation
    config.lr, config.epochs, config.weight_decay = 0.1, 60.0, 5e-4
    config.update(changes)
    return config


def all_arms(generations: int = 6, **changes: Any) -> ConfigDict:
    """Both splits, and the baselines, of as many epochs in all (`dsd`: of three generations)."""
    arms = ConfigDict({kind: arm(kind, generations, **changes) for kind in ("kels", "wels", "born_again")})
    arms.dsd = arm("dsd", 3, **changes)
    arms.long = arm("plain", 1, **changes)
    arms.long.epochs *= generations
    return arms


def published(config: ConfigDict, model: str, generations: int = 5) -> None:
    """The authors' recipe: batch 32, 200 epochs, rate 0.256 by a cosine of epochs after 5 of warm-up."""
    config.batch_size, config.eval_batch_size = 32, 32
    config.network.update({"model": model, "lr": 0.256, "schedule": "cosine_epochs", "warmup_epochs": 5.0})
    decay = 5e-4 if model.startswith("vgg") else 1e-4
    config.arms = all_arms(generations, lr=0.256, epochs=200.0, weight_decay=decay)


def hard(config: ConfigDict) -> None:
    """Clothes, and a network with batch norm."""
    config.seeds, config.ensemble, config.batch_size = 5, "loop", 50
    config.data.name, config.data.train_split, config.data.test_split = "fashion_mnist", "train[:10%]", "test"
    config.data.train_examples, config.data.validation_examples, config.data.test_per_class = 1000, 1000, 300
    config.data.shape, config.data.num_classes, config.data.num_examples = (28, 28, 1), 10, 6000
    config.data.mean, config.data.std, config.data.resize = (0.286,), (0.353,), 14
    config.data.weak = settings.augmentation(shift=1)
    config.network.update({"model": "cnn", "width": 16})
    config.arms = all_arms(5, lr=0.2, epochs=20.0)


def imagenet(config: ConfigDict) -> None:
    """As ResNet-18 is usually trained."""
    settings.imagenet(config)
    config.batch_size = 256
    steps = {"schedule": "steps", "milestones": (30, 60), "warmup_epochs": 0.0}
    config.network.update({"model": "resnet18", "lr": 0.1, **steps})
    config.arms = all_arms(3, lr=0.1, epochs=90.0, weight_decay=1e-4)
    config.arms.long.epochs = 90.0  # the steps of its schedule are those of one generation


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("knowledge_evolution")
    config.seeds, config.batch_size, config.eval_epochs = 16, 32, 0.0
    settings.digits8x8(config)
    config.data.train_examples, config.data.validation_examples = 200, 400
    config.data.mean, config.data.std = (0.3,), (0.37,)
    config.data.weak = config.data.strong = settings.augmentation()
    config.network = settings.network("mlp", 0.1, 60.0)  # epochs and decay are the arms'
    config.network.smoothing = 0.1  # of the labels
    config.arms = all_arms()
    if variant == "smoke":
        settings.smoke(config)
        config.network.hidden = (16, 16)
        config.arms = all_arms(3, epochs=0.8)
    elif variant == "hard":
        hard(config)
    elif variant in ("cub200", *CUB):
        settings.cub200(config)
        published(config, CUB.get(variant, "resnet18"))
        config.data.weak = settings.augmentation(flip=True)
    elif variant == "cifar100":
        settings.cifar100(config)
        published(config, "resnet18_cifar")
    elif variant == "imagenet":
        imagenet(config)
    return config
