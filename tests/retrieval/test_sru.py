import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import retrieval
from jkd.errors import UserError
from jkd.retrieval.sru import gated_average

KEY = jax.random.key(0)
WORDS = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
ALL = np.ones((2, 5), bool)
CELLS = {
    "sru": retrieval.SRU(4, layers=2),
    "parallel": retrieval.SRU(4, layers=2, peephole=False),
    "gru": retrieval.GRU(4, layers=2),
}
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


@functools.cache
def made(name):
    """Variables that are not zero anywhere, the outputs, and a loss's gradients by one program."""
    cell = CELLS[name]
    variables = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        cell.init(KEY, WORDS, ALL),
    )

    @jax.jit
    def both(words, mask):
        def loss(words):
            out = cell.apply(variables, words, mask)
            return jnp.where(mask[..., None], jnp.sin(out), 0).sum(), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(words)
        return out, gradient

    return variables["params"], both


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", ["sru", "parallel"])
def test_a_loop_in_numpy_agrees(name):
    params, both = made(name)
    x = WORDS.astype(np.float64)
    for layer in ("layer1", "layer2"):
        of = jax.tree.map(np.asarray, params[layer])
        products = np.split(x @ of["products"]["kernel"], 4 if layer == "layer1" else 3, axis=-1)
        highway = products[3] if layer == "layer1" else x
        v = of.get("peephole", np.zeros((2, 4)))
        state, out = np.zeros((2, 4)), []
        for t in range(5):
            u, forget, reset = (product[:, t] for product in products[:3])
            f, r = (sigmoid(a + b + g * state) for a, b, g in zip((forget, reset), of["bias"], v, strict=True))
            state = f * state + (1 - f) * u
            out.append(r * np.tanh(state) + (1 - r) * highway[:, t])
        x = np.stack(out, 1)
    close(both(WORDS, ALL)[0], x)


def test_states_from_a_scan_and_from_an_associative_one():
    u, a = np.random.default_rng(1).normal(size=(2, 2, 6, 3)).astype(np.float32)
    mask = np.array([[True] * 6, [True, False, True, True, False, False]])
    one = gated_average(u, a, jnp.zeros(3), mask)
    close(gated_average(u, a, None, mask), one)
    np.testing.assert_array_equal(one[:, 0], 0)
    np.testing.assert_array_equal(one[1, 2], one[1, 1])


def test_torch_gives_the_same_gru():
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    cell = retrieval.GRU(4)
    params = cell.init(KEY, WORDS, ALL)["params"]["layer1"]["cell"]
    peer = torch.nn.GRU(3, 4, batch_first=True)
    kernels = {kind: [np.asarray(params[f"{kind}{gate}"]["kernel"]).T for gate in "rzn"] for kind in "ih"}
    biases = [np.asarray(params[f"i{gate}"]["bias"]) for gate in "rzn"]
    with torch.no_grad():
        for kind, theirs in (("i", peer.weight_ih_l0), ("h", peer.weight_hh_l0)):
            theirs.copy_(torch.tensor(np.concatenate(kernels[kind])))
        peer.bias_ih_l0.copy_(torch.tensor(np.concatenate(biases)))
        peer.bias_hh_l0.zero_()
        peer.bias_hh_l0[8:] = torch.tensor(np.asarray(params["hn"]["bias"]))
        wanted = peer(torch.tensor(WORDS))[0].numpy()
    close(cell.apply({"params": {"layer1": {"cell": params}}}, WORDS, ALL), wanted)


@pytest.mark.parametrize("name", CELLS)
def test_padding_changes_nothing(name):
    _, both = made(name)
    kept = [0, 2, 3, 5, 7]
    padded, mask = np.full((2, 8, 3), 3.0, np.float32), np.zeros((2, 8), bool)
    padded[:, kept], mask[:, kept] = WORDS, True
    found, wanted = both(padded, mask), both(WORDS, ALL)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours[:, kept], theirs)
    np.testing.assert_array_equal(np.delete(found[1], kept, axis=1), 0)


@pytest.mark.parametrize("name", CELLS)
def test_words_see_no_later_ones(name):
    _, both = made(name)
    later = WORDS.copy()
    later[:, 3:] += 1
    close(both(later, ALL)[0][:, :3], both(WORDS, ALL)[0][:, :3])
    assert np.abs(both(later, ALL)[0][:, 3:] - both(WORDS, ALL)[0][:, 3:]).max() > 0.01


@pytest.mark.parametrize("kind", ["sru", "gru"])
def test_bfloat16(kind):
    low = {"sru": retrieval.SRU, "gru": retrieval.GRU}[kind](4, layers=1, dtype=jnp.bfloat16)
    variables = low.init(KEY, WORDS, ALL)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = low.apply(variables, WORDS, ALL)
    assert out.dtype == jnp.bfloat16
    close(np.asarray(out, np.float32), low.clone(dtype=jnp.float32).apply(variables, WORDS, ALL), atol=0.05)


def test_dropout_is_the_same_at_all_times():
    cell = retrieval.SRULayer(3, dropout=0.5)
    variables = {"params": {**cell.init(KEY, WORDS, ALL)["params"], "bias": jnp.full((2, 3), -30.0)}}
    out = cell.apply(variables, jnp.ones((2, 5, 3)), ALL, True, rngs={"dropout": KEY})
    # r = 0: the highway, which sees the input without dropout.
    close(out, 1)
    first = retrieval.SRU(3, layers=2, dropout=0.5, recurrent_dropout=0.0)
    layered = first.init(KEY, WORDS, ALL)["params"]
    layered = {name: {**of, "bias": jnp.full((2, 3), -30.0)} for name, of in layered.items()}
    out = first.apply({"params": layered}, jnp.ones((2, 5, 3)), ALL, True, rngs={"dropout": KEY})
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))
    assert set(np.unique(np.round(out, 4))) == {0, 2}


@pytest.mark.parametrize("cell", [retrieval.SRU(4, layers=0), retrieval.GRU(4, layers=0)])
def test_no_layers(cell):
    with pytest.raises(UserError, match="layers must be at least 1, got 0"):
        cell.init(KEY, WORDS, ALL)
