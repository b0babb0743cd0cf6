"""Online quantization of weights and activations."""

from pallas_kernels.quantize.api import matrix_amax as matrix_amax
from pallas_kernels.quantize.api import quantize as quantize
from pallas_kernels.quantize.fake import fake_quantize as fake_quantize
from pallas_kernels.quantize.into import QuantizationLoss as QuantizationLoss
from pallas_kernels.quantize.into import kernel_for as kernel_for
from pallas_kernels.quantize.into import quantize_into as quantize_into
from pallas_kernels.quantize.quotient import quotient as quotient
