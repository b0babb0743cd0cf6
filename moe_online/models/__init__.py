"""Language models built from `MoEConfig` layers: one generic decoder, text generation."""

from moe_online.models.decoder import Decoder as Decoder
from moe_online.models.decoder import DecoderConfig as DecoderConfig
from moe_online.models.decoder import KVCache as KVCache
