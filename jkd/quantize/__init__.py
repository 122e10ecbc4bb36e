"""Low-bit weights and activations with learnable levels, as functions, transforms of parameters, and layers."""

from jkd.quantize.activations import (
    channel_weights,
    quantization_error,
    quantize_activation,
    quantize_by_thresholds,
    weighted_basis_update,
)
from jkd.quantize.direct import (
    basis_update,
    chosen,
    direct_quantize,
    direct_quantize_binary,
    hard_onehot_ste,
    init_assignment,
    init_binary,
    nearest_levels,
)
from jkd.quantize.levels import (
    Levels,
    activation_basis,
    init_levels,
    levels_from_basis,
    nearest_index,
    weight_basis,
)
from jkd.quantize.models import ActQuant, DirectQuantConv, DirectQuantDense
from jkd.quantize.packing import Codes, dequantize, export_codes, pack_bits, unpack_bits
from jkd.quantize.transform import (
    bits_of,
    direct,
    flipped,
    is_choice,
    is_level,
    pack_params,
    packed_shapes,
    quantize_params,
    unpack,
)

__all__ = [
    "ActQuant",
    "Codes",
    "DirectQuantConv",
    "DirectQuantDense",
    "Levels",
    "activation_basis",
    "basis_update",
    "bits_of",
    "channel_weights",
    "chosen",
    "dequantize",
    "direct",
    "direct_quantize",
    "direct_quantize_binary",
    "export_codes",
    "flipped",
    "hard_onehot_ste",
    "init_assignment",
    "init_binary",
    "init_levels",
    "is_choice",
    "is_level",
    "levels_from_basis",
    "nearest_index",
    "nearest_levels",
    "pack_bits",
    "pack_params",
    "packed_shapes",
    "quantization_error",
    "quantize_activation",
    "quantize_by_thresholds",
    "quantize_params",
    "unpack",
    "unpack_bits",
    "weight_basis",
    "weighted_basis_update",
]
