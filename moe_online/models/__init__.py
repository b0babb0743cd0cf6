"""Language models built from `MoEConfig` layers: one generic decoder, text generation, loading from a folder."""

from moe_online.models.decoder import Decoder as Decoder
from moe_online.models.decoder import DecoderConfig as DecoderConfig
from moe_online.models.decoder import KVCache as KVCache
from moe_online.models.pretrained import CausalLM as CausalLM
from moe_online.models.pretrained import load as load
from moe_online.models.pretrained import plan as plan
