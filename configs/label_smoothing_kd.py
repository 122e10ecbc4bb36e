"""Label smoothing and distillation (Chandrasegaran et al., ICML 2022): a smoothed teacher at T = 1 and at raised T.

    python -m experiments.train --config configs/label_smoothing_kd.py --workdir runs/label_smoothing_kd

Two teachers that differ in the smoothing of their labels (0 and 0.1), and students of each by distillation alone,
T^2 KL at T = 1, 2, 3, 8 and 64. A last stage, `diffusion`, says how far the class centroids of the students' features
moved towards similar classes since T = 1.

Variants:
  default    5,000 MNIST digits, MLP teachers and students, 8 paired seeds: a minute or two on 2 CPU cores.
  smoke      the same code in seconds.
  hierarchy  made data of 10 super-classes x 4 classes, whose classes are similar by construction: two minutes.
  cifar100   ResNet-56 -> 20; the other standard pairs: cifar100_TEACHER_STUDENT, such as cifar100_vgg13_vgg8.
  imagenet   the paper's: ResNet-50 -> 18 (T = 8 is ours); imagenet_resnet50_resnet50.
  cub200     the paper's, on networks pretrained on ImageNet, which have to be given:
                 --config.teacher.init_from=resnet50.safetensors '--config.teacher.init_rules=params/head ->'
                 --config.student.init_from=resnet18.safetensors '--config.student.init_rules=params/head ->'
             Of the authors' augmentations it has crops and flips; rotation, gray and color jitter are left out.
             cub200_resnet50_mobilenet_v2.

CIFAR-100, ImageNet and CUB-200 (caltech_birds2011) need their data prepared as array_record (`data.data_dir`).
Pictures of a student's features: python -m experiments.projection.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import distillation_settings as settings
from experiments.distillation_settings import arm
from experiments.settings import augmentation

CIFAR = tuple(name for name, (data, _) in settings.PAIRS.items() if data == "cifar100")
# Teacher and student of the paper, by variant.
IMAGENET = {"imagenet": ("resnet50", "resnet18"), "imagenet_resnet50_resnet50": ("resnet50", "resnet50")}
CUB = {"cub200": ("resnet50", "resnet18"), "cub200_resnet50_mobilenet_v2": ("resnet50", "mobilenet_v2")}
VARIANTS = ("default", "smoke", "hierarchy", *CIFAR, *IMAGENET, *CUB)
TEMPERATURES = {"t1": 1.0, "t2": 2.0, "t3": 3.0, "t8": 8.0, "t64": 64.0}
TEACHERS = {"": "teacher", "smooth_": "smooth"}

# The super-classes of CIFAR-100; its classes are numbered in alphabetical order.
CIFAR_SUPERCLASSES = (
    "beaver dolphin otter seal whale",
    "aquarium_fish flatfish ray shark trout",
    "orchid poppy rose sunflower tulip",
    "bottle bowl can cup plate",
    "apple mushroom orange pear sweet_pepper",
    "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe",
    "bee beetle butterfly caterpillar cockroach",
    "bear leopard lion tiger wolf",
    "bridge castle house road skyscraper",
    "cloud forest mountain plain sea",
    "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk",
    "crab lobster snail spider worm",
    "baby boy girl man woman",
    "crocodile dinosaur lizard snake turtle",
    "hamster mouse rabbit shrew squirrel",
    "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "bicycle bus motorcycle pickup_truck train",
    "lawn_mower rocket streetcar tank tractor",
)


def all_arms(**changes: Any) -> ConfigDict:
    """Students by distillation alone: the five temperatures with either teacher."""
    return ConfigDict(
        {
            f"{prefix}{name}": arm({"kd": 1.0}, temperature=temperature, teachers=(teacher,), **changes)
            for prefix, teacher in TEACHERS.items()
            for name, temperature in TEMPERATURES.items()
        }
    )


def diffusion() -> ConfigDict:
    """Which classes are similar to each, in the last stage."""
    config = ConfigDict()
    config.superclass = ()  # a name or number for each class; empty: the nearest classes are the similar ones,
    config.neighbors = 2  # so many,
    config.reference = "teacher"  # by this teacher's features of the training rows
    config.resamples = 2000  # of the target classes, for the intervals
    return config


def hierarchy(config: ConfigDict) -> None:
    """Vectors of 64 numbers, of which 3,000 to train, 1,000 to validate and 2,000 to test."""
    config.data.name, config.data.train_split, config.data.test_split = "hierarchy", "train", "test"
    config.data.shape, config.data.num_classes, config.data.num_examples = (8, 8, 1), 40, 4000
    config.data.mean, config.data.std = (0.5,), (0.125,)
    config.data.weak = config.data.strong = augmentation()  # the images' neighborhoods mean nothing
    config.teacher.epochs, config.arms = 30.0, all_arms(lr=0.05, epochs=30.0)
    config.eval_epochs = 0.0
    config.diffusion.superclass = tuple(i // 4 for i in range(40))


def cifar100(config: ConfigDict, pair: str) -> None:
    """The CIFAR-100 protocol; its super-classes say which classes are similar."""
    settings.cifar100(config, pair)
    numbers = {name: i for i, names in enumerate(CIFAR_SUPERCLASSES) for name in names.split()}
    config.diffusion.superclass = tuple(numbers[name] for name in sorted(numbers))


def imagenet(config: ConfigDict, teacher: str, student: str) -> None:
    """The authors' code: batch 256, teachers of 90 epochs, students of 200 with a warm-up over 5."""
    settings.imagenet(config, f"{teacher}-{student}")
    config.batch_size, config.eval_batch_size = 256, 256
    config.teacher.update({"lr": 0.1, "epochs": 90.0, "milestones": (30, 60)})
    config.student.warmup_epochs = 5.0
    config.arms = all_arms(lr=0.1, epochs=200.0, milestones=(80, 160))


def cub200(config: ConfigDict, teacher: str, student: str) -> None:
    """The authors' code: a tenth of ImageNet's rates, students without warm-up and with ten times the decay."""
    imagenet(config, teacher, student)
    config.data.name, config.data.test_split = "caltech_birds2011", "test"
    config.data.num_classes, config.data.num_examples = 200, 5994
    config.teacher.lr, config.arms = 0.01, all_arms(lr=0.01, epochs=200.0, milestones=(80, 160))
    config.student.update({"warmup_epochs": 0.0, "weight_decay": 1e-3})
    config.loop.checkpoint_every = 500


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("label_smoothing_kd")
    config.teachers = ConfigDict({"teacher": {}, "smooth": {"smoothing": 0.1}})
    config.arms = all_arms(lr=0.05)
    config.diffusion = diffusion()
    if variant == "hierarchy":
        hierarchy(config)
    elif variant in IMAGENET:
        imagenet(config, *IMAGENET[variant])
    elif variant in CUB:
        cub200(config, *CUB[variant])
    else:
        settings.vary(config, variant, cifar100=cifar100)
    return config
