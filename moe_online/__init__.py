"""Loads full-precision Mixture-of-Experts checkpoints, quantizes the experts while they load, and runs them."""

from moe_online.config import MoEConfig as MoEConfig
from moe_online.config import OnlineQuantConfig as OnlineQuantConfig
from moe_online.errors import CheckpointError as CheckpointError
from moe_online.errors import CheckpointNotFound as CheckpointNotFound
from moe_online.errors import ConfigError as ConfigError
from moe_online.errors import CorruptCheckpoint as CorruptCheckpoint
from moe_online.errors import DtypeMismatch as DtypeMismatch
from moe_online.errors import MemoryBudgetError as MemoryBudgetError
from moe_online.errors import MissingWeights as MissingWeights
from moe_online.errors import NonFiniteWeight as NonFiniteWeight
from moe_online.errors import ShapeMismatch as ShapeMismatch
from moe_online.errors import UnexpectedWeights as UnexpectedWeights
from moe_online.experts import ExpertWeights as ExpertWeights
from moe_online.experts import SharedExpertWeights as SharedExpertWeights
from moe_online.layer import moe_layer as moe_layer
from moe_online.loading import CheckpointSource as CheckpointSource
from moe_online.loading import LoadPlan as LoadPlan
from moe_online.loading import LoadReport as LoadReport
from moe_online.loading import LoadResult as LoadResult
from moe_online.loading import load as load
from moe_online.loading import plan as plan
from moe_online.method import OnlineMoEMethodBase as OnlineMoEMethodBase
from moe_online.method import get_method as get_method
from moe_online.method import register_scheme as register_scheme
from moe_online.schemes import QuantSpec as QuantSpec
