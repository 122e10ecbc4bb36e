"""Any two distillation losses add up under one jit."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jkd import distill

# What a loss needs besides the logits of one view of a batch.
GIVEN = {
    "student_weak": "student_logits",
    "student_strong": "student_logits",
    "teacher_weak": "teacher_logits",
    "teacher_strong": "teacher_logits",
}
LOSSES = {
    name: getattr(distill, name)
    for name in distill.__all__
    if name.endswith("_loss")
    and {"student_logits", "student_weak"} & set(inspect.signature(getattr(distill, name)).parameters)
}


def values(student, teacher, labels):
    """The value of every loss, each called with what its signature asks for."""
    known = {"student_logits": student, "teacher_logits": teacher, "labels": labels, "temperature": 4.0}
    known |= {"e_low": -8.0, "e_high": -6.0, "weights": jnp.ones(len(labels))}
    found = []
    for loss in LOSSES.values():
        parameters = inspect.signature(loss).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty]
        given = {name: known[GIVEN.get(name, name)] for name in needed}
        if loss is distill.ensemble_kd_loss:
            given["teacher_logits"] = jnp.stack([teacher, -teacher])
        found.append(loss(**given))
    return jnp.stack(found)


def test_every_loss_is_here():
    assert {"kd_loss", "dkd_loss", "energy_kd_loss", "cskd_loss", "r2kd_loss", "cskd_two_view_loss"} <= set(LOSSES)
    assert len(LOSSES) >= 12


def test_any_two_losses_add_up():
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(0, 3, (2, 8, 5)).astype(np.float32)
    labels = draw.integers(0, 5, 8)
    pairs = np.array(list(itertools.combinations(range(len(LOSSES)), 2)))

    @jax.jit
    def sums(student, teacher):
        each, pull = jax.vjp(lambda s, t: values(s, t, labels), student, teacher)
        both = jnp.zeros((len(pairs), len(LOSSES))).at[np.arange(len(pairs))[:, None], pairs].set(1)
        return each, both @ each, *jax.vmap(pull)(both)

    each, added, to_student, to_teacher = sums(student, teacher)
    assert np.isfinite(added).all()
    np.testing.assert_allclose(added, np.asarray(each)[pairs].sum(1), rtol=1e-5)
    assert np.isfinite(to_student).all()
    trains = np.array([name != "spearman_loss" for name in LOSSES])
    assert (np.abs(to_student).max((1, 2)) > 0)[trains[pairs].any(1)].all()
    np.testing.assert_array_equal(to_teacher, 0)
