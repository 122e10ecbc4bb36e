"""One training step with low-bit weights and activations, against the same step in full precision.

A step is the forward pass (training mode) of a residual network on 32x32 images, cross-entropy, the gradient, and SGD
with momentum 0.9 and weight decay 5e-4; choices of levels take Adam instead. Every low-bit variant's first loss must be
that of the dense kernels it stands for, and its first gradients those of a plain formula, before any clock starts. All
variants run in turn, forth and back, in one process. The peer is brevitas: low-bit convolutions with learned scales,
against the same network of torch.nn.Conv2d.

    python -m benchmarks.quantize_step [--model resnet20] [--repeats 9] [--batch 64] [--only TEXT] [--no-peer]
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.distill_step import DECAY, MOMENTUM, RATE, Variant, measure
from jkd import nn, quantize, train
from jkd.interop.torch import to_torch

GOAL = 1.5
ADAM = 0.03  # the rate of choices
AGREE, CLOSE = 1e-4, 0.05  # of losses and of whole gradients, relative
WATCHED = ("block1_0", "layer1", "conv", "kernel")  # has so many values


@dataclasses.dataclass(frozen=True)
class Kind:
    """A variant: bits of weights (0: all) in a form of `quantize_params`, and bits of activations (0: all)."""

    name: str
    bits: int = 0
    form: str = "onehot"
    activations: int = 0


KINDS = (
    Kind("full precision"),
    Kind("2 bit, one-hot", 2),
    Kind("2 bit, binary", 2, "binary"),
    Kind("2 bit, LQ-Nets", 2, "lq"),
    Kind("4 bit, one-hot", 4),
    Kind("4-bit activations", activations=4),
    Kind("w4a4, one-hot", 4, activations=4),
    Kind("w4a4, binary", 4, "binary", 4),
)
PEERS = (Kind("PyTorch"), Kind("brevitas w2", 2), Kind("brevitas w4a4", 4, activations=4))


@dataclasses.dataclass(frozen=True)
class Task:
    """A network with random weights, and a batch."""

    model: Any
    variables: Any
    images: np.ndarray
    labels: np.ndarray


def make_task(name: str, batch: int, num_classes: int = 10) -> Task:
    model = nn.build(name, num_classes=num_classes)
    random = np.random.RandomState(0)
    images = random.randn(batch, 32, 32, 3).astype(np.float32)
    variables = nn.init(model, jax.random.key(0), (32, 32, 3))
    return Task(model, variables, images, random.randint(0, num_classes, batch))


def prepared(task: Task, kind: Kind) -> tuple[Any, Callable]:
    """Variables and the apply_fn of a variant; its "params" are those that are trained."""
    variables, apply_fn = dict(task.variables), task.model.apply
    if kind.activations:
        stats = quantize.activation_stats(apply_fn, variables, (32, 32, 3), kind.activations)
        variables["quant_stats"] = stats
        apply_fn = quantize.low_bit_activations(apply_fn, kind.activations)
    if kind.bits:
        split = functools.partial(quantize.quantize_params, bits=kind.bits, form=kind.form)
        variables["params"] = jax.jit(split)(variables["params"])
    return variables, apply_fn


def loss_of(apply_fn: Callable, join: Callable, task: Task) -> Callable:
    """(params, model state) -> (loss, new state)."""

    def loss(params: Any, state: Any) -> Any:
        out, moved = nn.apply_train(apply_fn, join(params), state, task.images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(out.logits, task.labels).mean(), moved

    return loss


def make_optimizer(params: Any) -> optax.GradientTransformation:
    """Adam for choices; SGD for the rest, with weight decay but for levels; nothing for what is frozen."""
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )
    choices, decayed = (
        jax.tree.map(fn, names) for fn in (quantize.is_choice, lambda name: not quantize.is_level(name))
    )
    labels = jax.tree.map(lambda choice: "choice" if choice else "rest", choices)
    # What an optimizer does not see has no place in the mask either.
    rest = optax.chain(
        optax.add_decayed_weights(DECAY, mask=lambda tree: _like(tree, decayed)), optax.sgd(RATE, MOMENTUM)
    )
    grouped = optax.multi_transform({"choice": optax.adam(ADAM), "rest": rest}, labels)
    return optax.chain(grouped, optax.masked(optax.set_to_zero(), quantize.frozen(params)))


def _like(tree: Any, marks: Any) -> Any:
    return jax.tree.map(
        lambda x, mark: x if isinstance(x, optax.MaskedNode) else mark,
        tree,
        marks,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def ours(task: Task, kind: Kind) -> Variant:
    """A jitted step of jkd."""
    variables, apply_fn = prepared(task, kind)
    loss, optimizer = loss_of(apply_fn, quantize.direct(), task), make_optimizer(variables["params"])

    def step(state: train.TrainState) -> Any:
        def loss_fn(params: Any, batch: Any, key: Any) -> Any:
            value, moved = loss(params, state.model_state)
            return value, train.Aux({}, moved)

        state, metrics = train.make_train_step(loss_fn, optimizer)(state, None, jax.random.key(0))
        if kind.form == "lq":
            state = dataclasses.replace(state, params=quantize.refresh_bases(state.params))
        return state, metrics["loss"]

    state = train.create_state(jax.tree.map(jnp.copy, variables), optimizer)
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()

    def run(steps: int) -> list[float]:
        nonlocal state
        losses = []
        for _ in range(steps):
            state, value = compiled(state)
            losses.append(value)
        return [float(value) for value in losses]

    return Variant(kind.name, False, run)


def check(task: Task, kind: Kind) -> None:
    """The first loss and gradients of a low-bit variant against those of a plain formula."""
    if kind.activations:
        # Behind low-bit activations a rounding grows from layer to layer: they are checked by themselves.
        check_activations(kind.activations)
        return
    variables, apply_fn = prepared(task, kind)
    params, state = nn.split(variables)
    if kind.bits:
        kernel = functools.reduce(lambda tree, name: tree[name], WATCHED, quantize.direct()(params))
        assert len(np.unique(kernel)) <= 2**kind.bits * (kernel.shape[-1] if kind.form == "lq" else 1), kind.name
    found, wanted = (
        jax.jit(jax.value_and_grad(lambda p, join=join: loss_of(apply_fn, join, task)(p, state)[0]))(params)
        for join in (quantize.direct(), plain_join)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=AGREE, err_msg=kind.name)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        # As a whole: roundings move activations across thresholds, and sums over a layer's weights cancel.
        apart = np.linalg.norm(np.ravel(one - other))
        assert apart <= CLOSE * np.linalg.norm(np.ravel(other)) + 1e-12, kind.name


def check_activations(bits: int) -> None:
    """Low-bit activations against the nearest of all sums, and their basis against least squares."""
    x = np.abs(np.random.RandomState(1).randn(500, 8)).astype(np.float32)
    basis = quantize.activation_basis(bits)
    digits = (np.arange(2**bits)[:, None] >> np.arange(bits)[None]) & 1
    near = np.abs(x[..., None] - (digits @ basis)[None, None]).argmin(-1)
    found = jax.jit(quantize.quantize_activation)(x, basis)
    np.testing.assert_allclose(found, (digits @ basis)[near], rtol=AGREE)
    root = 1 / np.sqrt(x.var(0) + 1e-5)
    wanted, *_ = np.linalg.lstsq((digits[near] * root[None, :, None]).reshape(-1, bits), (x * root[None]).ravel())
    weights = quantize.channel_weights(x)
    np.testing.assert_allclose(quantize.weighted_basis_update(x, basis, weights, delta=0.0), wanted, rtol=1e-2)


def plain_join(params: Any) -> Any:
    """What `quantize.direct` does, by products with one-hot choices and signs."""
    if not isinstance(params, dict):
        return params
    if params.keys() == {"assignment", "levels"}:
        return quantize.hard_onehot_ste(params["assignment"]) @ params["levels"]
    if params.keys() == {"codes", "basis"}:
        codes = params["codes"]
        clipped = jnp.clip(codes, -1, 1)
        signs = jax.lax.stop_gradient(jnp.where(codes >= 0, 1.0, -1.0) - clipped) + clipped
        return signs @ params["basis"]
    if params.keys() == {"latent", "basis"}:
        sums = jax.vmap(lambda basis: quantize.levels_from_basis(basis, signed=True).values)(params["basis"])
        distance = jnp.abs(params["latent"][..., None] - jnp.expand_dims(sums, range(params["latent"].ndim - 1)))
        near = jnp.where(distance == distance.min(-1, keepdims=True), jnp.broadcast_to(sums, distance.shape), jnp.inf)
        return params["latent"] + jax.lax.stop_gradient(near.min(-1) - params["latent"])
    return {name: plain_join(child) for name, child in params.items()}


def peers(task: Task, kinds: Sequence[Kind]) -> list[Variant]:
    """The network of PyTorch and of brevitas, channels last, SGD fused, eager."""
    import torch

    from benchmarks import _brevitas_peer, _torch_peer

    torch.set_num_threads(os.cpu_count() or 1)
    images = torch.tensor(task.images).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
    labels = torch.tensor(task.labels)

    def variant(kind: Kind) -> Variant:
        net = _torch_peer.load(task.model, to_torch(task.model, task.variables), "cpu").train()
        if kind.bits:
            net = _brevitas_peer.quantized(net, kind.bits, kind.activations)
        optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=True)

        def run(steps: int) -> list[float]:
            losses = []
            for _ in range(steps):
                loss = torch.nn.functional.cross_entropy(net(images), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return [float(loss) for loss in losses]

        return Variant(kind.name, False, run, peer=True)

    return [variant(kind) for kind in kinds]


def report(variants: Sequence[Variant]) -> None:
    """A row a variant; the ratio is to the first of its side, the median over repeats of paired ratios."""
    print(f"{'variant':24}{'ms':>9}{'fastest':>9}{'CPU ms':>9}{'ratio':>8}")
    for v in variants:
        base = next(other for other in variants if other.peer == v.peer)
        ratio = statistics.median(a / b for a, b in zip(v.times, base.times, strict=True))
        says = "" if v is base or v.peer else "   met" if ratio <= GOAL else "   MISSED"
        cells = (statistics.median(v.times), min(v.times), statistics.median(v.cpu))
        print(f"{v.name:24}" + "".join(f"{cell:9.1f}" for cell in cells) + f"{ratio:8.2f}{says}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="in a repeat")
    parser.add_argument("--only", default="", metavar="TEXT", help="of our variants, those whose name holds this")
    parser.add_argument("--no-peer", action="store_true", help="without PyTorch and brevitas")
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    task = make_task(args.model, args.batch)
    kinds = [kind for kind in KINDS if kind is KINDS[0] or args.only in kind.name]
    for kind in kinds:
        check(task, kind)
    variants = [ours(task, kind) for kind in kinds]
    missing = [name for name in ("torch", "brevitas") if importlib.util.find_spec(name) is None]
    if missing and not args.no_peer:
        print(f"without the peer: {', '.join(missing)} not installed: pip install torch brevitas")
    elif not args.no_peer:
        variants += peers(task, PEERS)
    for v in variants:
        assert np.isfinite(v.run(3)).all(), v.name
    measure(variants, args.repeats, args.steps)
    print(f"losses and gradients agree; goal: {GOAL} x full precision; load {os.getloadavg()[0]:.1f}")
    report(variants)


if __name__ == "__main__":
    main()
