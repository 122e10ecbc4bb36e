"""NNX modules behind linen's calling convention."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jkd import nn
from jkd.errors import UserError

X = jax.random.normal(jax.random.key(1), (6, 3)) + 2


class Net(nnx.Module):
    """Dense layers in a list (integers in the paths), batch normalization, dropout."""

    def __init__(self, rngs, rate=0.5):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.drop2 = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.drop2(self.drop(nnx.relu(self.norm(self.layers[0](x))))))


def test_evaluation_equals_the_module():
    module = Net(nnx.Rngs(0))
    variables, apply_fn = nn.from_nnx(module)
    module.eval()
    np.testing.assert_allclose(apply_fn(variables, X), module(X), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(apply_fn)(variables, X), module(X), rtol=1e-5, atol=1e-6)


def test_variables_look_like_linen():
    variables, _ = nn.from_nnx(Net(nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {
            "layers": {"0": {"kernel": (3, 4), "bias": (4,)}, "1": {"kernel": (4, 2), "bias": (2,)}},
            "norm": {"scale": (4,), "bias": (4,)},
        },
        "batch_stats": {"norm": {"mean": (4,), "var": (4,)}},
    }
    assert set(nn.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))[0]) == {"params"}


def test_training_equals_the_module_and_moves_the_statistics():
    module = Net(nnx.Rngs(0), rate=0.0)
    variables, apply_fn = nn.from_nnx(module)
    params, state = nn.split(variables)
    out, new = jax.jit(lambda *args: nn.apply_train(apply_fn, *args))(params, state, X)
    module.train()
    np.testing.assert_allclose(out, module(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], module.norm.mean[...], rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["norm"]["var"], module.norm.var[...], rtol=1e-5)
    assert float(jnp.abs(new["batch_stats"]["norm"]["mean"]).max()) > 0.01
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_the_given_module_never_changes():
    module = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    variables, apply_fn = nn.from_nnx(module)
    apply_fn(variables, X, train=True, mutable=True, rngs={"dropout": jax.random.key(0)})
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))), before)
    assert module.drop.deterministic is False
    apply_fn(variables, X)
    assert module.drop.deterministic is False


def test_gradients_equal_those_of_nnx():
    module = Net(nnx.Rngs(0))
    variables, apply_fn = nn.from_nnx(module)
    params, state = nn.split(variables)
    grads = jax.jit(jax.grad(lambda p: (nn.apply_eval(apply_fn, p, state, X) ** 2).sum()))(params)
    module.eval()
    theirs = nnx.to_pure_dict(nnx.grad(lambda m: (m(X) ** 2).sum())(module))
    for i in (0, 1):
        chex.assert_trees_all_close(grads["layers"][str(i)], theirs["layers"][i], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(grads["norm"], theirs["norm"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rngs", [nnx.Rngs(0), nnx.Rngs(params=0, dropout=1)], ids=["default", "named"])
def test_dropout_is_determined_by_the_key(rngs):
    class Drop(nnx.Module):
        def __init__(self):
            self.first = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.first(x), self.second(x)

    variables, apply_fn = nn.from_nnx(Drop())
    ones = jnp.ones((40, 50))

    @jax.jit
    def draw(key):
        return nn.apply_train(apply_fn, variables["params"], {}, ones, rngs={"dropout": key})[0]

    first, second = draw(jax.random.key(0))
    assert set(np.unique(first)) == {0.0, 2.0}
    assert 0.45 < float((first == 0).mean()) < 0.55
    # Layers draw apart, keys draw apart, the same key draws the same.
    assert 0.4 < float((first == second).mean()) < 0.6
    assert 0.4 < float((first == draw(jax.random.key(1))[0]).mean()) < 0.6
    np.testing.assert_array_equal(first, draw(jax.random.key(0))[0])
    np.testing.assert_array_equal(apply_fn(variables, ones)[0], ones)


def test_mutable_selects_what_comes_back():
    variables, apply_fn = nn.from_nnx(Net(nnx.Rngs(0), rate=0.0))
    for mutable in ("batch_stats", ["batch_stats"], ["batch_stats", "absent"]):
        _, new = apply_fn(variables, X, train=True, mutable=mutable)
        assert set(new) == {"batch_stats"}
    assert set(apply_fn(variables, X, train=True, mutable=True)[1]) == {"params", "batch_stats"}
    assert apply_fn(variables, X, mutable=[])[1] == {}


def test_other_variables_are_state():
    class Calls(nnx.Variable):
        pass

    class Counter(nnx.Module):
        def __init__(self):
            self.calls = Calls(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls[...] += 1
            return x

    variables, apply_fn = nn.from_nnx(Counter())
    _, state = nn.split(variables)
    for _ in range(3):
        _, state = nn.apply_train(apply_fn, {}, state, X)
    assert int(state["other"]["calls"]) == 3


def test_faults_are_named():
    variables, apply_fn = nn.from_nnx(Net(nnx.Rngs(params=0, dropout=1)))
    with pytest.raises(UserError, match=r"draws random numbers: pass rngs=\{'dropout': key\}"):
        jax.jit(lambda v: apply_fn(v, X, train=True, mutable=True))(variables)
    with pytest.raises(UserError, match=r"changes norm/mean: pass mutable=\['batch_stats'\]"):
        apply_fn(variables, X, train=True, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(UserError, match=r"variables\['batch_stats'\] lacks norm/mean"):
        apply_fn({"params": variables["params"]}, X)
