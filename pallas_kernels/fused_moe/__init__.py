"""The routed experts of a Mixture-of-Experts layer as one function."""

from pallas_kernels.fused_moe.api import fused_moe as fused_moe
