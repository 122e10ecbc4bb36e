import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@pytest.fixture(scope="package")
def over_devices():
    """Splits the leading axis of arrays over 8 devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return lambda *arrays: jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
