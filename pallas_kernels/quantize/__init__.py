"""Online quantization of weights and activations."""

from pallas_kernels.quantize.api import quantize as quantize
from pallas_kernels.quantize.quotient import quotient as quotient
