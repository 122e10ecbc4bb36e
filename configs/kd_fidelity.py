"""Attention and fidelity in KD (Guo et al., Expert Systems with Applications 262, 2025): a grid of views.

    python -m experiments.train --config configs/kd_fidelity.py --workdir runs/kd_fidelity

The arm `T1w_T2s_Ss` has a first teacher that was trained on weak views, a second one on strong views, and a student
that sees, with both of them, strong views. Teachers of one strength differ by their start and the order of their rows.

Variants:
  default      5,000 MNIST digits, convolutional nets, teachers twice as wide as students, 5 paired seeds; one and two
               teachers. All arms: some minutes on 2 CPU cores. --config.only=T1w_T2w_Sw,T1s_T2s_Ss runs two.
  smoke        the same code in seconds.
  cifar100     ResNet-50 -> 18 on images resized to 224, up to three teachers (28 arms). The authors' teachers start
               from ImageNet weights: --config.teacher.init_from=FILE.safetensors; without, they start at random.
  cifar100_lt  the same with a long tail (imbalance 100).
  imagenet     ResNet-50 -> 18. No schedule of its teachers is published: they get that of imagenet_lt.
  imagenet_lt  ImageNet with an exponential tail of imbalance 256. (ImageNet-LT is a list of images of its own.)

The large ones need their data prepared as array_record (`data.data_dir`). In the published schedules the rate rises by
epochs, here by steps; and the published figures are those of the best epoch: see `best epoch` in the tables.
"""

import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments import distillation_settings as settings
from experiments.distillation_settings import arm
from experiments.settings import augmentation

VARIANTS = ("default", "smoke", "cifar100", "cifar100_lt", "imagenet", "imagenet_lt")
STRENGTHS = {"w": "weak", "s": "strong"}
KD = {"ce": 0.6, "kd": 0.4}
EPOCHS = 20.0  # of the digits


def teachers(count: int) -> ConfigDict:
    """`count` teachers of each strength, t1_weak and so on."""
    made = {f"t{m + 1}_{view}": {"view": view, "replica": m} for m in range(count) for view in STRENGTHS.values()}
    return ConfigDict(made)


def all_arms(counts: Sequence[int]) -> ConfigDict:
    """Every setting of so many teachers: T1w_Sw, ..., T1s_T2s_Ss, ..."""
    arms = ConfigDict()
    for *taught, student in (letters for count in counts for letters in itertools.product("ws", repeat=count + 1)):
        name = "_".join([*(f"T{m}{letter}" for m, letter in enumerate(taught, start=1)), f"S{student}"])
        names = tuple(f"t{m}_{STRENGTHS[letter]}" for m, letter in enumerate(taught, start=1))
        arms[name] = arm(KD, teachers=names, view=STRENGTHS[student], temperature=3.0, lr=0.5, epochs=EPOCHS)
    return arms


def digits(config: ConfigDict) -> None:
    """Small convolutional nets on digits that are moved, turned and cut."""
    config.seeds, config.ensemble, config.eval_epochs = 5, "loop", 0.0
    config.data.strong = augmentation(shift=3, rotation=20.0, cutout=8)
    config.teacher.update({"model": "cnn", "width": 16, "lr": 0.5, "epochs": EPOCHS, "weight_decay": 0.0})
    config.student.update({"model": "cnn", "width": 8, "weight_decay": 0.0})


def smoke(config: ConfigDict) -> None:
    settings.smoke(config)
    config.data.strong = augmentation(cutout=2)
    config.teacher.width, config.student.width = 3, 2


def published(config: ConfigDict, teacher: tuple, student: tuple) -> None:
    """The published recipe: rate 0.1, batch 128, no weight decay, 8 epochs of warm-up; (epochs, milestones) of both."""
    config.batch_size = 128
    steps = {"schedule": "steps", "warmup_epochs": 8.0, "weight_decay": 0.0}
    epochs, milestones = teacher
    config.teacher.update({"lr": 0.1, "epochs": epochs, "milestones": milestones, **steps})
    config.teacher.init_rules = ("params/head/.* ->",)
    config.student.update(steps)
    epochs, milestones = student
    for one in config.arms.values():
        one.update({"lr": 0.1, "epochs": epochs, "milestones": milestones})


def cifar100(config: ConfigDict) -> None:
    settings.cifar100(config, "resnet50-resnet18")
    published(config, (61.0, (25, 40, 60)), (200.0, (190, 195)))
    config.data.resize = 224
    config.data.weak = augmentation(crop=0.2, flip=True, rotation=15.0)
    config.data.strong = augmentation(crop=0.2, flip=True, policy="autoaugment_cifar10", cutout=16)


def cifar100_lt(config: ConfigDict) -> None:
    cifar100(config)
    published(config, (61.0, (55,)), (175.0, (160, 165, 170)))
    config.data.imbalance = 100.0


def imagenet_lt(config: ConfigDict) -> None:
    settings.imagenet(config, "resnet50-resnet18")
    published(config, (60.0, (35, 50)), (165.0, (150, 155, 160)))
    config.data.imbalance = 256.0
    config.data.weak = augmentation(flip=True, jitter=0.4)
    config.data.strong = augmentation(flip=True, jitter=0.4, policy="randaugment")


def imagenet(config: ConfigDict) -> None:
    imagenet_lt(config)
    config.data.imbalance = 1.0
    config.student.schedule = "cosine"
    for one in config.arms.values():
        one.update({"epochs": 60.0, "milestones": (0,)})


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("kd_fidelity")
    large = variant not in ("default", "smoke")
    config.teachers, config.arms = teachers(3 if large else 2), all_arms((1, 2, 3) if large else (1, 2))
    digits(config)
    if variant != "default":
        globals()[variant](config)
    return config
