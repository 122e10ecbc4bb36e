"""What accelerators can do, by the makers' data sheets; figures a JAX device, of which a chip may hold two."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      kind: `jax.Device.device_kind`, or how it begins.
      peak_flops: dense bfloat16 FLOP/s of a device.
      hbm_bandwidth: bytes/s between a device and its memory.
      ici_bandwidth: bytes/s that a device sends to the others of its slice or node over all links together.
      devices: JAX devices in a chip.
      hbm_gib: memory of a device that a program may fill, as the compiler states it; 0 where it is not known.
      example: a topology that exists; "" for what cannot be planned for.
      options: what a description of the topology needs besides its name.
      dcn_bandwidth: bytes/s that a device sends to other slices over the data-center network; 0 where the maker does
        not say.
    """

    kind: str
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int = 1
    hbm_gib: float = 0.0
    example: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dcn_bandwidth: float = 0.0


# Google Cloud's pages of each TPU. They give links in both directions, halved here, and the network of a v5e as that
# of a pod; those of v4 come from its pod's all-reduce bandwidth, 1.1 PB/s over 4,096 chips.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 1.2e12, 270e9, 1, 30.75, "v4:2x2x4", {"chip_config_name": "megacore"}),
    "v5e": Chip("TPU v5 lite", 197e12, 0.819e12, 200e9, 1, 15.75, "v5e:16x16", dcn_bandwidth=6.4e12 / 8 / 256),
    "v5p": Chip("TPU v5", 459e12, 2.765e12, 600e9, 1, 95.74, "v5p:4x4x4", dcn_bandwidth=50e9 / 8),
    "v6e": Chip("TPU v6 lite", 918e12, 1.638e12, 400e9, 1, 31.25, "v6e:16x16", dcn_bandwidth=100e9 / 8),
    "tpu7x": Chip("TPU7x", 1153.5e12, 3.69e12, 300e9, 2, 94.75, "tpu7x:4x4x4", dcn_bandwidth=50e9 / 8),
}
GPUS = (
    Chip("NVIDIA A100", 312e12, 2.039e12, 300e9),
    Chip("NVIDIA H100", 989e12, 3.35e12, 450e9),
    Chip("NVIDIA H200", 989e12, 4.8e12, 450e9),
    Chip("NVIDIA B200", 2250e12, 8e12, 900e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a `device_kind`; None for what is not known here, such as a CPU."""
    for chip in TPUS.values():
        if device_kind == chip.kind:
            return chip
    return next((chip for chip in GPUS if device_kind.startswith(chip.kind)), None)
