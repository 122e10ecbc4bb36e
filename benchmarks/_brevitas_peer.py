"""The peer of `benchmarks.quantize_step`: a network whose convolutions are brevitas', with learned scales."""

import brevitas.nn as qnn
import torch
from brevitas.inject.enum import ScalingImplType
from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat


def quantized(net: torch.nn.Module, weight_bits: int, activation_bits: int) -> torch.nn.Module:
    """`net` with low-bit convolutions but for the first, of equal weights.

    Scales of weights are parameters that start at the weights' statistics; those of activations become parameters
    after one step of statistics.
    """
    options = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": weight_bits,
        "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
    }
    if activation_bits:
        options |= {
            "input_quant": Uint8ActPerTensorFloat,
            "input_bit_width": activation_bits,
            "input_collect_stats_steps": 1,
        }
    for name, conv in list(net.named_modules()):
        if not isinstance(conv, torch.nn.Conv2d) or name == "conv1":
            continue
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        new = qnn.QuantConv2d(*shape, bias=False, **options)
        new.weight.data.copy_(conv.weight.data)
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, new)
    return net.to(memory_format=torch.channels_last)
