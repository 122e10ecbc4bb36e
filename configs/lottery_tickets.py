"""Lottery tickets (Girish et al., CVPR 2021; Frankle and Carbin, ICLR 2019): pruned networks, trained again.

    python -m experiments.train --config configs/lottery_tickets.py --workdir runs/lottery_tickets

The stage `whole` trains the network and keeps its state after `late_epoch`. Arms keep 20, 5, 2 and 1 percent of the
weights: in one shot from that state (late_K) or from the initial weights (init_K), in four rounds (imp_K), and the
masks of the latter on fresh weights (imp_fresh_K) or shuffled in each layer (imp_shuffled_K). `dense` keeps all.
A ticket of another run, or of a file, becomes the mask of any arm, and its start:

    --config.source=runs/other:imp_5 --config.arms.late_5.mask=source --config.arms.late_5.start=source

Variants:
  default   scikit-learn's digits, 800 to train, an MLP 64-300-100-10, 16 paired seeds: two minutes on 2 CPU cores.
  smoke     the same code in seconds.
  cifar100  ResNet-18 for 32x32 images, 160 epochs; one-shot and iterative at 20 and 5 percent.
  imagenet  ResNet-18 by the authors' schedule for ImageNet: 90 epochs, rate 0.1, tenfold drops after 30 and 60. As in
            their code, shortcuts' projections and the head stay dense.

CIFAR-100 and ImageNet need their data prepared as array_record (`data.data_dir`).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import settings

VARIANTS = ("default", "smoke", "cifar100", "imagenet")


def arm(keep: float, **changes: Any) -> ConfigDict:
    """One ticket."""
    config = ConfigDict()
    config.keep = keep  # share of the prunable weights
    config.rounds = 2  # trainings in all, the first of the whole network: 2 is one-shot
    config.start = "late"  # or init, or fresh: initial weights that the mask was not found from; or source: its weights
    config.scope = "global"  # or layerwise: how weights are ranked
    config.mask = "magnitude"  # or shuffled (in each layer), or random; or source: that of another run's ticket
    config.lr = 0.1  # of the last training; the state that late tickets go back to keeps its momentum
    config.update(changes)
    return config


def all_arms(percents: tuple[int, ...], *, controls: bool, lr: float = 0.1) -> ConfigDict:
    """One-shot and iterative tickets of so many percent."""
    arms = ConfigDict({"dense": arm(1.0, lr=lr)})
    for percent in percents:
        keep, several = percent / 100, {"rounds": 4, "lr": lr}
        arms[f"late_{percent}"] = arm(keep, lr=lr)
        arms[f"imp_{percent}"] = arm(keep, **several)
        if controls:
            arms[f"init_{percent}"] = arm(keep, start="init", lr=lr)
            arms[f"imp_fresh_{percent}"] = arm(keep, start="fresh", **several)
            arms[f"imp_shuffled_{percent}"] = arm(keep, mask="shuffled", **several)
    if controls:
        arms.imp_layerwise_5 = arm(0.05, scope="layerwise", rounds=4, lr=lr)
        arms.imp_random_5 = arm(0.05, mask="random", rounds=4, lr=lr)
    return arms


def large(config: ConfigDict, epochs: float, milestones: tuple[int, ...]) -> None:
    """Networks with batch norm, one seed, rate 0.1."""
    steps = {"schedule": "steps", "milestones": milestones, "weight_decay": 1e-4}
    config.network.update({"lr": 0.1, "epochs": epochs, **steps})
    config.arms = all_arms((20, 5), controls=False)
    config.exempt = ("^head/", "/shortcut/")


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("lottery_tickets")
    config.seeds, config.batch_size, config.eval_epochs = 16, 50, 0.0
    settings.digits8x8(config)
    config.data.train_examples, config.data.validation_examples = 800, 400
    config.data.mean, config.data.std = (0.3,), (0.37,)
    config.data.weak = config.data.strong = settings.augmentation()
    config.network = settings.network("mlp", 0.1, 40.0)
    config.network.hidden, config.network.weight_decay = (300, 100), 0.0
    config.network.smoothing = 0.0  # of the labels
    config.late_epoch = 1.0  # after which the state is kept
    config.exempt = ("^head/",)  # regexes on paths of kernels that stay whole
    # A ticket to transfer: WORKDIR:STAGE, .safetensors or .pth file; rules "regex -> replacement", "regex ->" drops.
    config.source, config.source_rules = "", ("params/head/.* ->",)
    config.arms = all_arms((20, 5, 2, 1), controls=True)
    if variant == "smoke":
        settings.smoke(config)
        config.network.update({"hidden": (16,), "epochs": 2.0})
        config.late_epoch = 0.8
    elif variant == "cifar100":
        settings.cifar100(config)
        config.batch_size, config.network.model = 128, "resnet18_cifar"
        large(config, 160.0, (80, 120))
    elif variant == "imagenet":
        settings.imagenet(config)
        config.batch_size, config.network.model = 256, "resnet18"
        large(config, 90.0, (30, 60))
    return config
