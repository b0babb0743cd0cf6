"""From a checkpoint to parameters: config -> plan -> read -> quantize."""

from moe_online.loading.api import LoadResult as LoadResult
from moe_online.loading.api import load as load
from moe_online.loading.api import open_source as open_source
from moe_online.loading.api import plan as plan
from moe_online.loading.export import save_quantized as save_quantized
from moe_online.loading.mappings import get_mapping as get_mapping
from moe_online.loading.plan import LoadPlan as LoadPlan
from moe_online.loading.reload import reload as reload
from moe_online.loading.report import LoadReport as LoadReport
from moe_online.loading.report import TensorReport as TensorReport
from moe_online.loading.source import CheckpointSource as CheckpointSource
from moe_online.loading.source import StoredTensor as StoredTensor
