"""Everything that moe-online raises about a configuration or a checkpoint.

Each message says what was found, what was needed and what to do; `CheckpointError.names` holds every offending tensor,
also where the message shortens the list.
"""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be served, found when it is built or when a layer is resolved."""


class CheckpointError(Exception):
    """A checkpoint that does not give what the model asks for.

    Args:
      message: What was found, what was needed, the remedy.
      names: All tensors concerned.

    >>> error = ShapeMismatch("1 tensor has another shape: w2 (4, 8) where (8, 4) was needed", names=["w2"])
    >>> error.names
    ('w2',)
    """

    def __init__(self, message: str, *, names: Iterable[str] = ()):
        super().__init__(message)
        self.names = tuple(names)


class MissingWeights(CheckpointError):
    """The checkpoint lacks tensors that the model has."""


class UnexpectedWeights(CheckpointError):
    """The checkpoint has tensors that the model lacks."""


class ShapeMismatch(CheckpointError):
    """A tensor has another shape in the checkpoint than in the model."""


class DtypeMismatch(CheckpointError):
    """A tensor has a dtype from which the model's cannot be made."""


class NonFiniteWeight(CheckpointError):
    """A weight holds NaN or an infinity, which no scale can represent."""


class CorruptCheckpoint(CheckpointError):
    """A file is truncated or missing, or cannot be decoded."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class MemoryBudgetError(CheckpointError):
    """Loading would need more device memory than `memory_limit` allows."""
