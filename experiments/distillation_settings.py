"""What the configs of the distillation methods share: networks, arms, and the data sets with their training recipes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import settings
from experiments.settings import augmentation, network

WEIGHTS = ("ce", "kd", "dkd", "cosine", "cswt", "value", "rank", "two_view")
# The standard pairs of teacher and student, by variant.
CIFAR_PAIRS = (
    "resnet56-resnet20",
    "resnet110-resnet32",
    "resnet32x4-resnet8x4",
    "wrn_40_2-wrn_16_2",
    "wrn_40_2-wrn_40_1",
    "vgg13-vgg8",
    "vgg13-mobilenet_v2_cifar",
    "resnet50_cifar-mobilenet_v2_cifar",
    "resnet32x4-shufflenet_v1",
    "resnet32x4-shufflenet_v2",
    "wrn_40_2-shufflenet_v1",
)
IMAGENET_PAIRS = ("resnet34-resnet18", "resnet50-mobilenet")


def _variants(name: str, pairs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The first pair by the data's name alone, the others by all three names."""
    return {name if i == 0 else f"{name}_{pair.replace('-', '_')}": (name, pair) for i, pair in enumerate(pairs)}


PAIRS = _variants("cifar100", CIFAR_PAIRS) | _variants("imagenet", IMAGENET_PAIRS)
VARIANTS = ("default", "smoke", "hard", *PAIRS)
LIGHT = ("mobilenet", "shufflenet")  # students that take a learning rate of 0.01 there


def arm(weights: Mapping[str, float], **changes: Any) -> ConfigDict:
    """One student, as `experiments/arms.py` makes it; of its loss, terms without a weight are left out."""
    config = ConfigDict()
    config.weights = ConfigDict(dict.fromkeys(WEIGHTS, 0.0) | dict(weights))
    config.lr, config.epochs, config.milestones = 0.01, 40.0, (0,)
    config.batch_size = 0  # 0: that of the config
    config.teachers = ("teacher",)
    config.view = "weak"  # or strong: how its images, which all its teachers see, are augmented
    config.temperature = 4.0
    config.temperatures = "fixed"  # or energy: t_low, t_mid or t_high by the teacher's certainty
    config.t_low, config.t_mid, config.t_high = 2.0, 4.0, 6.0
    config.low_rate, config.high_rate = 0.3, 0.3  # shares of the groups of low and high energy
    config.alpha, config.beta, config.warmup_epochs = 1.0, 8.0, 20.0  # of dkd
    config.rank_mode, config.tau = "hard", 1.0  # of rank; soft ranks have a gradient
    config.prune_rate, config.teacher_weight = 0.0, 0.7  # a second, pruned copy of each teacher
    config.pruned_statistics = "running"  # or batch: what batch norm of the pruned copy uses
    config.mix = "none"  # which images are seen again, augmented: all, or the high_energy ones
    config.mixer = "cutmix"  # mixup, cutout, or strong: data.strong of the same images
    config.mix_group = 64  # images are mixed among so many neighbours: at most what one device holds
    config.mask_mode = "scale"  # of two_view; or select
    config.start = ""  # one of the teachers, a network like the student, whose weights it starts from
    config.keep = 1.0  # share of the start's kernels that stays, the largest
    config.bits, config.form = 0, "onehot"  # of the kernels, 0: full precision; binary, latent
    config.choice_scale, config.level_scale = 10.0, 0.1  # of the rates of Adam for choices and levels, times lr
    config.update(changes)
    return config


def warm_network(model: str, lr: float, epochs: float) -> ConfigDict:
    """A network that may start from stored variables."""
    config = network(model, lr, epochs)
    # A warm start: WORKDIR:STAGE, .safetensors or .pth file; rules "regex -> replacement", "regex ->" drops.
    config.init_from, config.init_rules = "", ()
    return config


def teacher(model: str, lr: float, epochs: float) -> ConfigDict:
    """The network of the teachers, and where its logits come from."""
    config = warm_network(model, lr, epochs)
    config.smoothing, config.view = 0.0, "weak"  # of its labels; or strong: how its images are augmented
    config.replica = 0  # another number: another start and another order of the same rows
    config.source, config.bank = "live", 8  # or cached: logits of so many views of each image
    config.workdir, config.stage = "", ""  # a finished run, or a file, to take it from; "": the stage of its own name
    return config


def base(method: str) -> ConfigDict:
    """5,000 MNIST digits and dense nets: the small default of every method. It has no arms yet."""
    config = settings.base(method)
    config.teacher = teacher("mlp", 0.05, 40.0)
    config.teachers = ConfigDict({"teacher": {}})  # stages by name, with what differs from `teacher`
    config.student = warm_network("mlp", 0.01, 40.0)
    config.student.hidden = (24, 24)
    config.student.exempt = ("^stem/", "^head/")  # regexes on paths of kernels that stay whole and in full precision
    return config


def smoke(config: ConfigDict) -> None:
    """Seconds: two seeds, few images, all arms."""
    settings.smoke(config)
    config.teacher.hidden, config.student.hidden = (16,), (8,)
    config.teacher.epochs = 0.8
    for one in config.arms.values():
        one.epochs, one.batch_size = 0.8, 0


def hard(config: ConfigDict) -> None:
    """Thirty classes with a long tail (digits, clothes, animal silhouettes), convolutional nets with batch norm."""
    config.seeds, config.ensemble, config.eval_epochs = 5, "loop", 0.0
    config.data.name, config.data.test_split = "digits_fashion_animals", "test"
    # Of 12,000 rows the tail leaves about 3,500: of clothes 370 to 150, of animals 130 to 50, of digits 17 a class.
    config.data.train_split, config.data.imbalance = "train[:20%]", 20.0
    config.data.train_examples, config.data.validation_examples = 0, 2000
    config.data.test_per_class = 150
    config.data.num_classes, config.data.num_examples = 30, 13700
    config.data.mean, config.data.std = (0.25,), (0.35,)
    config.data.weak = augmentation(shift=2)
    config.data.strong = augmentation(shift=3, cutout=8)
    config.data.resize = 14  # as well told apart by these networks as 28, in less than half the time
    config.teacher.update({"model": "cnn", "width": 16, "epochs": 24.0, "lr": 0.2})
    config.student.update({"model": "cnn", "width": 6})
    for one in config.arms.values():
        one.epochs, one.lr = 0.3 * one.epochs, 0.1


def cifar100(config: ConfigDict, pair: str) -> None:
    """The CIFAR-100 protocol of the distillation papers: 240 epochs, batch 64, tenfold drops after 150, 180 and 210."""
    settings.cifar100(config)
    steps = {"schedule": "steps", "milestones": (150, 180, 210)}
    big, small = pair.split("-")
    config.teacher.update({"model": big, "lr": 0.05, "epochs": 240.0, **steps})
    config.student.update({"model": small, **steps})
    lr = 0.01 if small.startswith(LIGHT) else 0.05
    for one in config.arms.values():
        one.update({"lr": lr, "epochs": 240.0 * one.epochs / 40, "milestones": (150, 180, 210)})


def imagenet(config: ConfigDict, pair: str) -> None:
    """The ImageNet protocol of the distillation papers: 100 epochs, batch 512, tenfold drops after 30, 60 and 90."""
    settings.imagenet(config)
    steps = {"schedule": "steps", "milestones": (30, 60, 90), "weight_decay": 1e-4}
    big, small = pair.split("-")
    config.teacher.update({"model": big, "lr": 0.2, "epochs": 100.0, **steps})
    config.student.update({"model": small, **steps})
    for one in config.arms.values():
        one.update({"lr": 0.2, "epochs": 100.0 * one.epochs / 40, "milestones": (30, 60, 90)})
        if one.temperatures == "fixed":
            one.temperature = 1.0


def vary(config: ConfigDict, variant: str, cifar100: Callable = cifar100, imagenet: Callable = imagenet) -> None:
    """Turns a method's default config into one of `VARIANTS`; the last two arguments are what the paper's take."""
    if variant in PAIRS:
        name, pair = PAIRS[variant]
        {"cifar100": cifar100, "imagenet": imagenet}[name](config, pair)
    elif variant != "default":
        {"smoke": smoke, "hard": hard}[variant](config)
