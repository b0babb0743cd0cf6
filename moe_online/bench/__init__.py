"""Measurements of whole loads; those of kernels are in `pallas_kernels.bench`."""
