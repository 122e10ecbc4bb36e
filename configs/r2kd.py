"""R2KD (Kim et al., IEEE TKDE 2024): cosine and rank distances to a teacher mixed with a pruned copy of itself.

    python -m experiments.train --config configs/r2kd.py --workdir runs/r2kd

Variants:
  default   5,000 MNIST digits, MLP teacher and students, 8 paired seeds: a minute or two on 2 CPU cores.
  smoke     the same code in seconds.
  hard      30 classes of digits, clothes and animals with a long tail, convolutional nets with batch norm, 5 seeds.
  cifar100  ResNet-56 -> 20; the other standard pairs: cifar100_TEACHER_STUDENT, such as cifar100_vgg13_vgg8.
  tiny_imagenet   the published code's setting: 64x64 images, crops of padding 8, ResNet-56 -> 20.
  imagenet  ResNet-34 -> 18; imagenet_resnet50_mobilenet.

CIFAR-100, Tiny ImageNet and ImageNet need their data prepared as array_record (`data.data_dir`).
"""

from ml_collections import ConfigDict

from experiments import distillation_settings as settings
from experiments.distillation_settings import arm

VARIANTS = (*settings.VARIANTS, "tiny_imagenet")
KD = {"ce": 0.1, "kd": 0.9}
VALUE = {"ce": 1.0, "value": 2.0}
RANK = {**VALUE, "rank": 2.0}  # hard ranks have no gradient: the term is a monitor, as in the published code


def all_arms() -> ConfigDict:
    """KD and R2KD, each without and with augmentations; R2KD without pruning, with soft ranks, and with a pruned copy
    whose batch norm uses the batch (which differs in nets that have some).
    """
    arms = ConfigDict()
    arms.ce = arm({"ce": 1.0})
    arms.kd = arm(KD)
    arms.kd_mixup = arm(KD, mix="all", mixer="mixup")
    arms.kd_cutmix = arm(KD, mix="all")
    arms.r2kd_value = arm(VALUE)
    arms.r2kd = arm(RANK, prune_rate=0.1)
    arms.r2kd_batch_statistics = arm(RANK, prune_rate=0.1, pruned_statistics="batch")
    arms.r2kd_soft = arm(RANK, prune_rate=0.1, rank_mode="soft")
    arms.r2kd_mixup = arm(RANK, prune_rate=0.1, mix="all", mixer="mixup")
    arms.r2kd_cutmix = arm(RANK, prune_rate=0.1, mix="all")
    arms.r2kd_cutout = arm(RANK, prune_rate=0.1, mix="all", mixer="cutout")
    arms.r2kd_strong = arm(RANK, prune_rate=0.1, mix="all", mixer="strong")
    return arms


def cifar100(config: ConfigDict, pair: str) -> None:
    """The CIFAR-100 protocol, with AutoAugment where the strong view is asked for."""
    settings.cifar100(config, pair)
    config.data.strong.policy = "autoaugment_cifar10"


def imagenet(config: ConfigDict, pair: str) -> None:
    """The ImageNet protocol, with AutoAugment where the strong view is asked for."""
    settings.imagenet(config, pair)
    config.data.strong.policy = "autoaugment_imagenet"
    for one in config.arms.values():
        if one.weights.kd:
            one.weights.update({"ce": 0.5, "kd": 0.5})
        else:
            one.temperature = 4.0


def tiny_imagenet(config: ConfigDict) -> None:
    """Tiny ImageNet as in the published code: the CIFAR-100 recipe on 64x64 images of 200 classes."""
    cifar100(config, "resnet56-resnet20")
    config.data.name, config.data.test_split = "tiny_imagenet", "validation"
    config.data.shape, config.data.num_classes, config.data.num_examples = (64, 64, 3), 200, 100000
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.weak.pad_crop = config.data.strong.pad_crop = 8
    config.data.strong.policy = "autoaugment_imagenet"


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("r2kd")
    config.arms = all_arms()
    if variant == "tiny_imagenet":
        tiny_imagenet(config)
    else:
        settings.vary(config, variant, cifar100, imagenet)
    return config
