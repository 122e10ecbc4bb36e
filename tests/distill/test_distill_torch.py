"""The losses against PyTorch, where it is installed (the extra `oracles`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd.distill import (
    correlation_value_loss,
    cskd_loss,
    dkd_terms,
    energy_kd_loss,
    energy_score,
    kd_loss,
    spearman_loss,
)

torch = pytest.importorskip("torch")
F = pytest.importorskip("torch.nn.functional")


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return *draw.normal(0, 4, (2, 32, 7)), draw.integers(0, 7, 32), draw.choice([2.0, 4.0, 6.0], 32)


def torch_kd(student, teacher, t):
    each = F.kl_div(
        F.log_softmax(student / t[:, None], 1),
        F.log_softmax(teacher / t[:, None], 1),
        reduction="none",
        log_target=True,
    )
    return each.sum(1) * t**2


def torch_dkd(student, teacher, labels, t):
    """Probabilities of (target, rest), and a softmax whose target logit is lowered by 1000."""
    target = F.one_hot(labels, student.shape[1]).to(student.dtype)
    pairs = []
    for logits in (student, teacher):
        p = F.softmax(logits / t[:, None], 1)
        pairs.append(torch.stack([(p * target).sum(1), (p * (1 - target)).sum(1)], 1))
    tckd = F.kl_div(pairs[0].log(), pairs[1], reduction="none").sum(1) * t**2
    lowered = [logits / t[:, None] - 1000 * target for logits in (student, teacher)]
    nckd = F.kl_div(F.log_softmax(lowered[0], 1), F.softmax(lowered[1], 1), reduction="none").sum(1) * t**2
    return tckd, nckd


def compare(ours, theirs, batch):
    """Values and student gradients in float64; both functions return one number."""
    student, teacher, labels, t = batch
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(ours)(jnp.asarray(student), teacher, labels, t)
    leaf = torch.tensor(student, requires_grad=True)
    expected = theirs(leaf, torch.tensor(teacher), torch.tensor(labels), torch.tensor(t))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_kd(batch):
    compare(lambda s, t, y, T: kd_loss(s, t, T), lambda s, t, y, T: torch_kd(s, t, T).mean(), batch)


@pytest.mark.parametrize("part", [0, 1])
def test_dkd(batch, part):
    compare(
        lambda s, t, y, T: dkd_terms(s, t, y, T)[part].mean(),
        lambda s, t, y, T: torch_dkd(s, t, y, T)[part].mean(),
        batch,
    )


def test_energy_kd(batch):
    def theirs(student, teacher, labels, t):
        energy = -4 * torch.logsumexp(teacher / 4, 1)
        chosen = torch.where(energy < -9, 6.0, torch.where(energy > -7, 2.0, 4.0)).double()
        assert len(chosen.unique()) == 3
        return 0.1 * F.cross_entropy(student, labels) + 0.9 * torch_kd(student, teacher, chosen).mean()

    compare(lambda s, t, y, T: energy_kd_loss(s, t, y, -9.0, -7.0), theirs, batch)


def test_energy(batch):
    expected = -4 * torch.logsumexp(torch.tensor(batch[1]) / 4, 1)
    np.testing.assert_allclose(energy_score(batch[1]), expected.numpy(), rtol=1e-6)


def torch_cosine(student, teacher, t, dim):
    """1 - the mean cosine of the probabilities."""
    p, q = (F.softmax(z / t[:, None], 1) for z in (student, teacher))
    return 1 - F.cosine_similarity(p, q, dim=dim).mean()


def test_correlation_value(batch):
    def theirs(student, teacher, labels, t):
        t = torch.full_like(t, 4)
        return 32 * (torch_cosine(student, teacher, t, 0) + torch_cosine(student, teacher, t, 1))

    compare(lambda s, t, y, T: correlation_value_loss(s, t), theirs, batch)


def test_cskd(batch):
    def theirs(student, teacher, labels, t):
        alike = F.cosine_similarity(F.softmax(student, 1), F.softmax(teacher, 1)).detach()
        chosen = 2 + 4 * (alike.max() - alike) / (alike.max() - alike.min())
        cosines = 2 * chosen.mean() ** 2 * torch_cosine(student, teacher, chosen, 0)
        return (
            F.cross_entropy(student, labels) + 32 * torch_cosine(student, teacher, torch.full_like(t, 4), 0) + cosines
        )

    compare(lambda s, t, y, T: cskd_loss(s, t, y), theirs, batch)


def test_soft_ranks(batch):
    def theirs(student, teacher, labels, t):
        z = (student - student.mean(1, keepdim=True)) / student.std(1, keepdim=True, correction=0)
        ranks = 0.5 + torch.sigmoid((z[:, :, None] - z[:, None, :]) / 0.5).sum(2)
        targets = teacher.argsort(1).argsort(1).double()
        pair = (x - x.mean(1, keepdim=True) for x in (ranks, targets))
        return 2 * (1 - F.cosine_similarity(*pair).mean())

    compare(lambda s, t, y, T: spearman_loss(s, t, rank_mode="soft", tau=0.5), theirs, batch)
