"""Flax modules around the functional layer."""

from moe_online.flax.linear import Linear as Linear
from moe_online.flax.nnx import MoE as MoE
