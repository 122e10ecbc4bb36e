"""One of two processes: sweeps, sums and gathers ten rows on meshes whose order is not that of the processes."""

import json
import sys

import jax
import numpy as np

from jkd import data, train

ROWS, BATCH = 10, 4


def measure(mesh) -> dict:
    """Every row once and in order, whatever the mesh."""
    images = np.arange(ROWS, dtype=np.uint8).reshape(ROWS, 1, 1, 1)
    rows = data.from_arrays(images, np.arange(ROWS) % 2, num_classes=2)
    found = {}
    for kind in ("device", "stream"):
        source = data.source(rows, BATCH, resident=kind)

        def collect(published, consts, batch, mask):
            return {"pixel": batch["image"][:, 0, 0, 0], "index": batch["index"]}

        def add(published, consts, batch, mask):
            return (batch["index"] * mask).sum()

        swept = train.sweep(lambda args, batch, key: batch["index"], None, source, mesh=mesh)
        gather = train.Evaluator(source, collect, lambda x: {n: v.tolist() for n, v in x.items()}, kind="gather")
        total = train.Evaluator(source, add, lambda x: {"total": int(x)})
        found[kind] = {
            "swept": swept.tolist(),
            **train.evaluate(gather, {}, {}, mesh=mesh),
            **train.evaluate(total, {}, {}, mesh=mesh),
        }
    return found


def main() -> None:
    port, process = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    a, b, c, d = jax.devices()
    meshes = {
        "straight": train.make_mesh(devices=[a, b, c, d]),
        "reversed": train.make_mesh(devices=[c, d, a, b]),
        "interleaved": train.make_mesh(devices=[a, c, b, d]),
        "tensor across processes": train.make_mesh(data=2, tensor=2, devices=[a, c, b, d]),
        "one batch for all": train.make_mesh(data=1, tensor=4, devices=[a, b, c, d]),
        "fsdp": train.make_mesh(data=1, fsdp=4, devices=[b, c, d, a]),
    }
    print(json.dumps({name: measure(mesh) for name, mesh in meshes.items()}))


if __name__ == "__main__":
    main()
