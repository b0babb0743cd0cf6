"""Flax modules around the functional layer."""

from moe_online.flax.nnx import MoE as MoE
