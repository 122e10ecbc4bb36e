"""Programs that run without the code of their model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import nn
from jkd.errors import UserError
from jkd.interop.stablehlo import export_predictor, load_stablehlo, save_stablehlo

pytest.importorskip("flatbuffers")
SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def model():
    """A net with convolutions, pooling and batch statistics."""
    net = nn.build("cnn", 5, width=4)
    variables = nn.init(net, jax.random.key(0), SHAPE)

    def predict(variables, images):
        out = net.apply(variables, images / jnp.float32(255), train=False)
        return {"logits": out.logits, "pool": out.features["pool"]}

    return predict, variables


def images(count):
    return np.random.RandomState(count).randint(0, 256, (count, *SHAPE), np.uint8)


@pytest.mark.parametrize("baked", [True, False])
def test_a_file_gives_the_outputs_for_any_batch(baked, model, tmp_path):
    predict, variables = model
    save_stablehlo(tmp_path / "net", export_predictor(predict, variables, SHAPE, baked=baked))
    program = load_stablehlo(tmp_path / "net")
    assert program.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 7):
        args = (images(count),) if baked else (variables, images(count))
        found, expected = program.call(*args), predict(variables, images(count))
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            np.testing.assert_allclose(found[name], rows, atol=1e-5)
    other = jax.tree.map(lambda x: x + 1, variables)
    if not baked:  # its variables may be others
        again = program.call(other, images(2))["logits"]
        np.testing.assert_allclose(again, predict(other, images(2))["logits"], rtol=1e-4)
    assert len(program.in_avals) == (1 if baked else 1 + len(jax.tree.leaves(variables)))


def test_refusals(model, tmp_path):
    predict, variables = model
    with pytest.raises(UserError, match="Unknown platform 'gpu'"):
        export_predictor(predict, variables, SHAPE, platforms=("gpu",))
    with pytest.raises(UserError, match=r"needs a platform and images \(H, W, C\), got \['cpu'\] and \[8, 8\]"):
        export_predictor(predict, variables, (8, 8), platforms=("cpu",))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_stablehlo(tmp_path / "none")
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds no exported program"):
        load_stablehlo(tmp_path / "mine")
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        save_stablehlo(tmp_path / "mine", export_predictor(predict, variables, SHAPE, platforms=("cpu",)))
