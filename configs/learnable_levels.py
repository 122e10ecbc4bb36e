"""Direct quantization with learnable levels (Hoang et al., IJCAI 2020; the equations are ours), and its baselines.

    python -m experiments.train --config configs/learnable_levels.py --workdir runs/learnable_levels

The stage `float` trains the network in full precision, and every arm goes on from it, at 2 bits and at 1 bit:
nearest_B rounds to k-means levels and trains nothing; ste_fixed_B and ste_B train latent weights behind these levels,
fixed or learned; lq_B is LQ-Nets; direct_B trains scores of each weight's levels (direct_slow_B at a tenth of their
rate, identity_B with another gradient), binary_B signs of a basis. `full` trains on in full precision.

Variants:
  default   5,000 MNIST digits, 2,000 to train, an MLP 784-64-64-10 with batch norm, all layers low-bit, 8 paired seeds:
            three minutes on 2 CPU cores.
  smoke     the same code in seconds.
  channels  low-bit activations without training, where six of 64 channels are 30 times as large as the others: one
            basis for all channels alike, and the channel-aware ones.
  cifar100  ResNet-18 for 32x32 images, 160 epochs: weights of 1, 2 and 3 bits, and activations of as many.
  imagenet  ResNet-18, 90 epochs; its full-precision start may be given: --config.network.init_from=FILE.

The paper's text gives no recipe that could be followed; those of the large variants are what is usual in the field.
CIFAR-100 and ImageNet need their data prepared as array_record (`data.data_dir`).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import settings

VARIANTS = ("default", "smoke", "channels", "cifar100", "imagenet")


def arm(form: str = "", bits: int = 2, **changes: Any) -> ConfigDict:
    """How one network is made smaller, and trained on."""
    config = ConfigDict()
    config.form = form  # of the weights: onehot, binary, latent or lq; empty: full precision
    config.bits = bits
    config.per_channel = False  # whether each output channel has levels of its own, as always under lq
    config.learn_levels = True  # of latent
    config.gradient, config.tau = "softmax", 1.0  # of onehot
    config.act_bits, config.act_mode = 0, "variance"  # of the layers' inputs, 0: as they are; uniform, energy, robust
    config.lr = 1e-3
    config.choice_scale, config.level_scale = 100.0, 1.0  # of the rates of Adam for choices and levels, times lr
    config.epochs = 15.0  # 0: nothing is trained
    config.update(changes)
    return config


def weights(bits: int, **changes: Any) -> dict[str, ConfigDict]:
    """All ways to train low-bit weights."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "nearest": ("latent", {"epochs": 0.0}),
        "ste_fixed": ("latent", {"learn_levels": False}),
        "ste": ("latent", {}),
        "lq": ("lq", {}),
        "direct": ("onehot", {}),
        "direct_slow": ("onehot", {"choice_scale": 10.0}),
        "identity": ("onehot", {"choice_scale": 10.0, "gradient": "identity"}),
        "binary": ("binary", {"choice_scale": 10.0}),
    }
    return {f"{name}_{bits}": arm(form, bits, **changes | own) for name, (form, own) in ways.items()}


def channels(config: ConfigDict) -> None:
    """Low-bit activations of a network whose channels differ in scale."""
    settings.digits8x8(config)
    config.data.train_examples, config.data.validation_examples = 800, 400
    config.data.mean, config.data.std = (0.3,), (0.37,)
    config.network.update({"hidden": (64,), "norm": False, "epochs": 30.0})
    config.scaled.update({"count": 6, "factor": 30.0})
    modes = ("uniform", "variance", "energy", "robust")
    config.arms = ConfigDict({"full": arm(epochs=0.0)})
    config.arms.update({mode: arm(act_bits=2, act_mode=mode, epochs=0.0) for mode in modes})


def large(config: ConfigDict, model: str, lr: float, epochs: float) -> None:
    """Weights, and weights with activations, of a residual network but its first and last layers."""
    config.network.update({"model": model, "lr": lr, "epochs": epochs, "optimizer": "sgd", "weight_decay": 1e-4})
    config.exempt, config.act_exempt = ("^stem/", "^head/"), ("^stem/", "^head/")
    config.seeds, config.ensemble = 1, "loop"
    # Weights take SGD, choices and levels Adam at 0.1 (or 0.01) and 0.001 as in the small networks.
    shared: dict[str, Any] = {"lr": 0.1 * lr, "epochs": epochs, "level_scale": 0.1}
    arms = {"full": arm(**shared)}
    for bits in (1, 2, 3):
        arms |= {name: one for name, one in weights(bits, **shared).items() if not name.startswith("identity")}
        for name in (f"direct_{bits}", f"direct_slow_{bits}", f"binary_{bits}"):
            arms[name].choice_scale *= 0.1
        for mode in ("uniform", "variance"):
            arms[f"w{bits}a{bits}_{mode}"] = arm(
                "onehot", bits, choice_scale=10.0, act_bits=bits, act_mode=mode, **shared
            )
    arms["w4a4_binary"] = arm("binary", 4, choice_scale=1.0, act_bits=4, **shared)
    config.arms = ConfigDict(arms)


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("learnable_levels")
    config.seeds, config.batch_size, config.eval_epochs = 8, 64, 0.0
    config.data.train_examples, config.data.validation_examples = 0, 1000  # the other 2,000
    config.data.train_split, config.data.test_split = "train+test[:2000]", "test[2000:]"
    config.data.weak = config.data.strong = settings.augmentation()
    config.network = settings.network("mlp", 1e-3, 10.0)
    config.network.hidden, config.network.norm = (64, 64), True
    config.network.optimizer, config.network.weight_decay = "adam", 0.0
    config.network.smoothing = 0.0  # of the labels
    config.network.init_from = ""  # WORKDIR:STAGE or a file of weights: the network in full precision
    config.exempt = ()  # regexes on paths of kernels that stay in full precision
    config.act_exempt = ("^hidden1/",)  # and of those whose inputs do
    config.calibration_examples = 1000  # at most, where activations are low-bit and nothing is trained
    config.scaled = ConfigDict({"count": 0, "factor": 1.0})  # so many channels before the head are made larger
    config.arms = ConfigDict({"full": arm(), **weights(2), **weights(1)})
    if variant == "smoke":
        settings.smoke(config)
        config.network.update({"hidden": (16,), "epochs": 0.8})
        for one in config.arms.values():
            one.epochs = min(one.epochs, 0.8)
        config.arms.w2a2 = arm("onehot", act_bits=2, epochs=0.8)
    elif variant == "channels":
        channels(config)
    elif variant == "cifar100":
        settings.cifar100(config)
        config.batch_size = 128
        large(config, "resnet18_cifar", 0.1, 160.0)
    elif variant == "imagenet":
        settings.imagenet(config)
        config.batch_size = 256
        large(config, "resnet18", 0.1, 90.0)
    return config
