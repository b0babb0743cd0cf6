"""From router logits to experts, and from experts to rows sorted by expert."""

from pallas_kernels.routing.api import route as route
from pallas_kernels.routing.custom import RoutingFunction as RoutingFunction
from pallas_kernels.routing.custom import llama4_routing as llama4_routing
from pallas_kernels.routing.groups import ExpertOrder as ExpertOrder
from pallas_kernels.routing.groups import GroupMetadata as GroupMetadata
from pallas_kernels.routing.groups import make_group_metadata as make_group_metadata
from pallas_kernels.routing.groups import sort_by_expert as sort_by_expert
from pallas_kernels.routing.mask import mask_tokens as mask_tokens
from pallas_kernels.routing.simulate import SimulatedRouting as SimulatedRouting
