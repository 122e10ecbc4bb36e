"""Compression and distillation together: 2-bit, pruned students of any loss, on Fashion-MNIST.

    python -m experiments.train --config configs/quantized_distillation.py --workdir runs/quantized_distillation

`dense` trains the student's network on labels. Every arm starts there, keeps the largest tenth of the weights, gives
them 2 bits, and learns by its own loss: `ce` from labels alone, the others from `teacher` too. The whole composition is
the line `SMALL` below; the same fields make any student of configs/energy_kd.py, cosine_kd.py or r2kd.py small.

Variants:
  default   5,000 rows of Fashion-MNIST, MLPs, 8 paired seeds: two minutes on 2 CPU cores. The set is found in
            data.data_dir, or where Debian's package dataset-fashion-mnist puts it.
  smoke     the same code in seconds, on scikit-learn's digits.
  cifar100  ResNet-56 -> 20; other standard pairs: cifar100_TEACHER_STUDENT.
  imagenet  ResNet-34 -> 18.

CIFAR-100 and ImageNet need their data prepared as array_record (`data.data_dir`).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import distillation_settings
from experiments.distillation_settings import arm

VARIANTS = ("default", "smoke", *distillation_settings.PAIRS)
SMALL: dict[str, Any] = {"start": "dense", "keep": 0.1, "bits": 2}


def all_arms(**changes: Any) -> ConfigDict:
    """One student for each loss."""
    losses: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
        "ce": ({"ce": 1.0}, {}),
        "kd": ({"ce": 0.1, "kd": 0.9}, {}),
        "dkd": ({"ce": 1.0, "dkd": 1.0}, {"warmup_epochs": 5.0}),
        "energy_kd": ({"ce": 0.1, "kd": 0.9}, {"temperatures": "energy"}),
        "cskd": ({"ce": 1.0, "cosine": 2.0}, {}),
        "r2kd": ({"ce": 1.0, "value": 1.0, "rank": 1.0}, {"rank_mode": "soft"}),
    }
    return ConfigDict({name: arm(weights, **SMALL | own | changes) for name, (weights, own) in losses.items()})


def get_config(variant: str = "default") -> ConfigDict:
    config = distillation_settings.base("quantized_distillation")
    config.data.name, config.data.train_split, config.data.test_split = "fashion_mnist", "train[:20%]", "test"
    config.data.train_examples, config.data.validation_examples, config.data.test_per_class = 5000, 2000, 500
    config.data.num_examples = 12000
    config.data.mean, config.data.std = (0.286,), (0.353,)
    config.student.hidden = (64, 64)
    config.arms = all_arms(epochs=20.0)
    if variant != "default":
        config.data.test_per_class = 0
        distillation_settings.vary(config, variant)
    # The start is a network like the student, trained on labels by the student's recipe.
    same = {name: config.student[name] for name in ("model", "hidden", "width", "norm", "schedule", "milestones")}
    config.teachers.dense = ConfigDict(same)
    return config
