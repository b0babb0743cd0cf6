"""The experts of a Mixture-of-Experts layer as one function, and as the steps that it is made of."""

from pallas_kernels.fused_moe.api import fused_moe as fused_moe
from pallas_kernels.fused_moe.config import FusedMoeConfig as FusedMoeConfig
from pallas_kernels.fused_moe.dense import fused_ffn as fused_ffn
from pallas_kernels.fused_moe.pipeline import Prepared as Prepared
from pallas_kernels.fused_moe.pipeline import finalize as finalize
from pallas_kernels.fused_moe.pipeline import prepare as prepare
from pallas_kernels.fused_moe.pipeline import run_experts as run_experts
