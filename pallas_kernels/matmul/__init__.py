"""Dense matmul with quantized operands."""

from pallas_kernels.matmul.api import matmul as matmul
