"""Mappings of well-known model families, as data: one TOML table of rules per family, read by `get_mapping`.

They lead from the names that a family has on the Hugging Face Hub to those of `moe_online.models.Decoder`. What a rule
says is in `moe_online.loading.mapping`; a mapping is a dict, so it is extended with `|`.
"""

from __future__ import annotations

import importlib.resources
import tomllib

from moe_online.errors import ConfigError

MAPPINGS = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")  # as `model_type` in config.json has them


def get_mapping(name: str) -> dict[str, str]:
    """The rules of a family: pattern of stored names -> what they become.

    Args:
      name: One of `MAPPINGS`, the `model_type` in a checkpoint's config.json.

    Raises:
      ConfigError: another name.

    >>> get_mapping("mixtral")["model.embed_tokens.weight"]
    '-> embed.embedding'
    """
    if name not in MAPPINGS:
        raise ConfigError(f"no mapping is named {name!r}; there are {', '.join(MAPPINGS)}. Or give your own dict")
    file = importlib.resources.files(__name__) / f"{name}.toml"
    rules: dict[str, str] = tomllib.loads(file.read_text("utf-8"))
    return rules
