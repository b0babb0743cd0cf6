"""One matmul per group of rows, each with its own weights."""

from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
