"""Cosine similarity KD (Ham et al., 2023): per class, the cosine of both networks' probabilities over the batch.

    python -m experiments.train --config configs/cosine_kd.py --workdir runs/cosine_kd

Variants:
  default   5,000 MNIST digits, MLP teacher and students, 8 paired seeds: a minute or two on 2 CPU cores.
  smoke     the same code in seconds.
  hard      30 classes of digits, clothes and animals with a long tail, convolutional nets with batch norm, 5 seeds.
  cifar100  ResNet-56 -> 20; the other standard pairs: cifar100_TEACHER_STUDENT, such as cifar100_vgg13_vgg8. The arms
            `cskd*` are trained like the baselines, 240 epochs on one view; `cskd_two_view` as in the published code,
            480 epochs of a weak and a RandAugment view at half the rate.
  imagenet  ResNet-34 -> 18; imagenet_resnet50_mobilenet.

CIFAR-100 and ImageNet need their data prepared as array_record (`data.data_dir`).
"""

from ml_collections import ConfigDict

from experiments import distillation_settings as settings
from experiments.distillation_settings import arm

VARIANTS = settings.VARIANTS
CSKD = {"ce": 1.0, "cosine": 2.0}
CSWT = {**CSKD, "cswt": 2.0}


def all_arms() -> ConfigDict:
    """The baselines, the loss with one temperature and with temperatures by similarity, batch sizes, and two views."""
    arms = ConfigDict()
    arms.ce = arm({"ce": 1.0})
    arms.kd = arm({"ce": 0.1, "kd": 0.9})
    arms.cskd = arm(CSKD)
    arms.cskd_cswt = arm(CSWT)
    arms.cskd_cswt_b16 = arm(CSWT, batch_size=16)
    arms.cskd_cswt_b256 = arm(CSWT, batch_size=256)
    arms.cskd_two_view = arm({"two_view": 1.0}, mix="all", mixer="strong")
    return arms


def cifar100(config: ConfigDict, pair: str) -> None:
    """The protocol of the published code for two views: 480 epochs, half the rate (not of the light students)."""
    settings.cifar100(config, pair)
    two = config.arms.cskd_two_view
    two.epochs = 480.0
    if two.lr == 0.05:
        two.lr = 0.025


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("cosine_kd")
    config.arms = all_arms()
    settings.vary(config, variant, cifar100=cifar100)
    return config
