"""What the stages of one distillation config share: its data, views, models, and which arms and teachers it runs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.compression import Compressed
from jkd import distill, nn, quantize, train
from jkd.errors import unknown


def selected_arms(config: ConfigDict) -> list[str]:
    """The arms to run: those in `only`, or all; names of teachers alone train no student."""
    for name in config.only:
        if name not in (*config.arms, *config.teachers):
            raise unknown("arm in config.only", name, (*config.arms, *config.teachers))
    return [name for name in config.only or config.arms if name in config.arms]


def selected_teachers(config: ConfigDict) -> list[str]:
    """The teachers to run, in the config's order: those in `only`, and those of the selected arms."""
    wanted = {*config.only, *(name for arm in selected_arms(config) for name in needed(config.arms[arm]))}
    return [name for name in config.teachers if name in wanted]


def needed(arm: ConfigDict) -> tuple[str, ...]:
    """The stages that a student needs: its teachers, and the one that it starts from."""
    return tuple(dict.fromkeys((*arm.teachers, *((arm.start,) if arm.start else ()))))


def teacher_section(config: ConfigDict, name: str) -> ConfigDict:
    """The section `teacher` with the changes of one teacher."""
    section = config.teacher.copy_and_resolve_references()
    for field, value in config.teachers[name].items():
        if field not in section:
            raise unknown(f"field of teachers.{name}", field, section)
        section[field] = value
    return section


def batch_size(config: ConfigDict, arm: ConfigDict) -> int:
    """An arm's own, or the config's."""
    return arm.batch_size or config.batch_size


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share.

    Attributes:
      config: the whole of it.
      task: its data.
      views: "weak" and "strong": how images are augmented.
      teachers: the teachers' models by name.
      network: the model of all students.
    """

    config: Any
    task: cls.Task
    views: Mapping[str, cls.Views]
    teachers: Mapping[str, Any]
    network: Any

    @classmethod
    def of(cls_, config: ConfigDict) -> "Setup":
        """Loads the data and builds the models of a config."""
        task = cls.load_task(config)
        build = functools.partial(cls.build_model, task=task, precision=config.precision)
        teachers = {name: build(teacher_section(config, name)) for name in config.teachers}
        return cls_(config, task, cls.make_views(config), teachers, build(config.student))

    @functools.cached_property
    def student(self) -> Compressed:
        """How all students are applied: their variables may hold masks, and levels and choices instead of kernels."""
        return Compressed(self.network.apply, quantize.direct())

    @property
    def cached(self) -> bool:
        """Whether students see cached logits of the teachers."""
        return self.config.teacher.source == "cached"

    def rows(self, name: str) -> Callable:
        """The source of an evaluator: the "train", "validation" or "test" rows in order."""
        return functools.partial(self.task.part, name=name, batch_size=self.config.eval_batch_size)

    def model(self, stage: str) -> Any:
        """The model that a stage trains."""
        return self.teachers.get(stage, self.network)

    def teach(self, name: str, variables: Any, images: jax.Array) -> jax.Array:
        """A teacher's logits, in evaluation mode and without gradient."""
        return jax.lax.stop_gradient(self.teachers[name].apply(variables, images, train=False).logits)

    # One function object for all arms: equal programs then compile once.

    @functools.cached_property
    def bank_logits(self) -> dict[tuple[str, str], Callable]:
        """For `sweep`: a teacher's logits for one view of a bank, by its name and the strength of the views."""

        def logits(name: str, strength: str, args: Any, batch: Any, key: jax.Array) -> jax.Array:
            views = self.views[strength]
            return self.teach(
                name, args["teacher"], bank_view(views, args["bank_key"], args["view"], batch["index"], batch["image"])
            )

        return self._by_teacher(logits)

    @functools.cached_property
    def energies(self) -> dict[tuple[str, str], Callable]:
        """For `sweep`: a teacher's energy for random views, by its name and the strength of the views."""

        def energies(name: str, strength: str, teacher: Any, batch: Any, key: jax.Array) -> jax.Array:
            return distill.energy_score(self.teach(name, teacher, self.views[strength].train(key, batch["image"])))

        return self._by_teacher(energies)

    def _by_teacher(self, fn: Callable) -> dict[tuple[str, str], Callable]:
        return {(name, view): functools.partial(fn, name, view) for name in self.teachers for view in self.views}

    @functools.cached_property
    def accuracies(self) -> dict[str, train.Evaluator]:
        """The accuracies of a student."""
        _, per_epoch = cls.steps_of(self.config, self.task, 1)
        return cls.accuracy_evaluators(self.config, self.task, self.student, self.views["weak"], per_epoch)


def bank_view(views: cls.Views, key: Any, view: Any, index: jax.Array, images: jax.Array) -> jax.Array:
    """View `view` of each image: decided by the view's and the image's number alone, whatever the batch."""
    view = jnp.broadcast_to(view, index.shape)

    def one(number: Any, row: Any, image: jax.Array) -> jax.Array:
        return views.train(jax.random.fold_in(jax.random.fold_in(key, number), row), image[None])[0]

    return jax.vmap(one)(view, index, images)


def variable_shapes(setup: Setup, stage: str) -> Any:
    """The shapes and dtypes of the variables of the model that a stage trains."""
    return jax.eval_shape(lambda: nn.init(setup.model(stage), jax.random.key(0), setup.task.shape))
