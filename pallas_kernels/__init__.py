"""Kernels for quantized Mixture-of-Experts layers: arrays in, arrays out. Never imports `moe_online`."""

from pallas_kernels.formats import Format as Format
from pallas_kernels.formats import QuantizedArray as QuantizedArray
from pallas_kernels.formats import get_format as get_format
from pallas_kernels.implementations import UnsupportedError as UnsupportedError
from pallas_kernels.quantize import quantize as quantize
