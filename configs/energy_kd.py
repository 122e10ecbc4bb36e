"""Energy KD (Kim et al., Knowledge-Based Systems 296, 2024), its baselines and its controls.

    python -m experiments.train --config configs/energy_kd.py --workdir runs/energy_kd

Variants:
  default      5,000 MNIST digits: of 2,000, each seed draws 1,000 to train and 1,000 to validate; 3,000 to test; MLP
               teacher and students, 8 paired seeds. All seeds of all arms: about a minute on 2 CPU cores.
  smoke        the same code in seconds.
  hard         30 classes of digits, clothes and animals with a long tail, convolutional nets with batch norm, 5 seeds.
  cifar100     the authors' setting: ResNet-56 -> 20; needs cifar100 prepared as array_record (`data.data_dir`).
               The other standard pairs: cifar100_TEACHER_STUDENT, such as cifar100_vgg13_vgg8.
  cifar100_lt  ResNet-56 -> 20 with a long tail (imbalance 100).
  imagenet     ResNet-34 -> 18, needs imagenet2012 prepared as array_record; imagenet_resnet50_mobilenet.

Every arm has its own learning rate, epochs and loss: --config.arms.kd.lr=0.02; --config.only=ce,kd runs two arms.
"""

from ml_collections import ConfigDict

from experiments import distillation_settings as settings
from experiments.distillation_settings import arm

VARIANTS = (*settings.VARIANTS, "cifar100_lt")
KD = {"ce": 0.1, "kd": 0.9}
DKD = {"ce": 1.0, "dkd": 1.0}


def all_arms(long: float = 1.5) -> ConfigDict:
    """The paper's arms, and two controls: the temperatures of the authors' code, which are the paper's reversed, and KD
    with the epochs of `long` training.
    """
    arms = ConfigDict()
    arms.ce = arm({"ce": 1.0})
    arms.kd = arm(KD)
    arms.energy_kd = arm(KD, temperatures="energy")
    arms.energy_kd_reversed = arm(KD, temperatures="energy", t_low=6.0, t_high=2.0)
    arms.dkd = arm(DKD)
    arms.energy_dkd = arm(DKD, temperatures="energy", low_rate=0.1, high_rate=0.1)
    arms.kd_cutmix = arm(KD, mix="all")
    arms.kd_he_da = arm(KD, mix="high_energy", low_rate=0.0, high_rate=0.5)
    arms.kd_long = arm(KD, epochs=40.0 * long)
    arms.energy_kd_long = arm(KD, temperatures="energy", epochs=40.0 * long)
    return arms


def cifar100(config: ConfigDict, pair: str) -> None:
    """The paper's CIFAR-100 setting.

    The authors train KD, DKD and HE-DA for 240 epochs and what follows energies for 360: the arms `*_long`. Every arm
    has its partner of equal epochs; `energy_kd_reversed_long` is the authors' code as it stands.
    """
    arms = config.arms
    arms.dkd_long, arms.energy_dkd_long = (arms[name].copy_and_resolve_references() for name in ("dkd", "energy_dkd"))
    arms.energy_kd_reversed_long = arms.energy_kd_reversed.copy_and_resolve_references()
    for name in ("dkd_long", "energy_dkd_long", "energy_kd_reversed_long"):
        arms[name].epochs *= 1.5
    settings.cifar100(config, pair)
    for name in arms:
        if name.endswith("_long"):
            arms[name].milestones = (150, 180, 210, 240, 270, 300)
    # The authors' for these pairs. Those of DKD also serve Energy DKD, which they trained for other nets only.
    if pair == "resnet56-resnet20":
        arms.kd_he_da.high_rate = 0.4
    beta = {"resnet56-resnet20": 2.0, "vgg13-vgg8": 6.0}.get(pair, 8.0)
    for name in ("dkd", "dkd_long", "energy_dkd", "energy_dkd_long"):
        arms[name].beta = beta


def imagenet(config: ConfigDict, pair: str) -> None:
    """The paper's ImageNet setting: 100 epochs, batch 512, KD weights 0.5/0.5 at T = 1."""
    settings.imagenet(config, pair)
    for one in config.arms.values():
        if one.weights.kd:
            one.weights.update({"ce": 0.5, "kd": 0.5})  # no published setting of Energy KD: KD's weights
        if one.weights.dkd:
            one.update({"beta": 0.5, "warmup_epochs": 1.0})
        if one.mix != "high_energy":
            one.low_rate = one.high_rate = 0.2
    config.arms.kd_he_da.high_rate = 0.2


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("energy_kd")
    config.arms = all_arms()
    settings.vary(config, variant.removesuffix("_lt"), cifar100, imagenet)
    if variant == "cifar100_lt":
        config.data.imbalance = 100.0
    return config
