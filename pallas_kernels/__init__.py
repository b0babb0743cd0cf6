"""Kernels for quantized Mixture-of-Experts layers: arrays in, arrays out. Never imports `moe_online`."""

from pallas_kernels.activations import Activation as Activation
from pallas_kernels.activations import deinterleave as deinterleave
from pallas_kernels.activations import get_activation as get_activation
from pallas_kernels.formats import Format as Format
from pallas_kernels.formats import QuantizedArray as QuantizedArray
from pallas_kernels.formats import get_format as get_format
from pallas_kernels.fused_moe import FusedMoeConfig as FusedMoeConfig
from pallas_kernels.fused_moe import Prepared as Prepared
from pallas_kernels.fused_moe import finalize as finalize
from pallas_kernels.fused_moe import fused_ffn as fused_ffn
from pallas_kernels.fused_moe import fused_moe as fused_moe
from pallas_kernels.fused_moe import prepare as prepare
from pallas_kernels.fused_moe import run_experts as run_experts
from pallas_kernels.grouped_matmul import grouped_matmul as grouped_matmul
from pallas_kernels.implementations import UnsupportedError as UnsupportedError
from pallas_kernels.implementations import interpreted as interpreted
from pallas_kernels.matmul import matmul as matmul
from pallas_kernels.quantize import QuantizationLoss as QuantizationLoss
from pallas_kernels.quantize import matrix_amax as matrix_amax
from pallas_kernels.quantize import quantize as quantize
from pallas_kernels.quantize import quantize_into as quantize_into
from pallas_kernels.routing import GroupMetadata as GroupMetadata
from pallas_kernels.routing import make_group_metadata as make_group_metadata
from pallas_kernels.routing import route as route
