"""What `route` refuses, and what it says then."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import route

LOGITS = jnp.zeros((2, 8))
REFUSED = {
    "scoring": ({"scoring": "tanh"}, ValueError, "'tanh'; valid names: sigmoid, softmax, sqrtsoftplus"),
    "top_k": ({"top_k": 9}, ValueError, "top_k=9 must be between 1 and the 8 experts"),
    "no expert": ({"top_k": 0}, ValueError, "top_k=0 must be between"),
    "batch axes": ({"router_logits": LOGITS[None]}, ValueError, "flatten"),
    "integer logits": (
        {"router_logits": LOGITS.astype(jnp.int32)},
        TypeError,
        "logits.dtype=.*int32.* must be a floating",
    ),
    "one of two": ({"num_expert_group": 4}, ValueError, "num_expert_group=4, topk_group=None: .* give the other"),
    "the other": ({"topk_group": 4}, ValueError, "num_expert_group=None, topk_group=4"),
    "more than there are": ({"num_expert_group": 2, "topk_group": 3}, ValueError, "=2, topk_group=3: .* at most"),
    "no group": ({"num_expert_group": 2, "topk_group": 0}, ValueError, "topk_group=0: must be at least 1"),
    "no groups": ({"num_expert_group": 0, "topk_group": 0}, ValueError, "num_expert_group=0.*must be at least 1"),
    "few experts": (
        {"num_expert_group": 4, "topk_group": 1, "top_k": 3},
        ValueError,
        "=4, topk_group=1: the kept groups hold 2 of the 8 experts, fewer than top_k=3; raise topk_group",
    ),
    "bias shape": (
        {"e_score_correction_bias": jnp.zeros((1, 8))},
        ValueError,
        r"bias of shape \(1, 8\) must .* \(8,\)",
    ),
    "bias dtype": (
        {"e_score_correction_bias": np.zeros(8, np.int32)},
        TypeError,
        "bias of dtype int32 must be floating",
    ),
    "mask shape": ({"token_mask": np.ones(8, bool)}, ValueError, r"token_mask of shape \(8,\) must .* \(2,\)"),
    "mask dtype": ({"token_mask": np.ones(2, np.int32)}, TypeError, "token_mask of dtype int32 must be bool"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        route(**{"router_logits": LOGITS, "top_k": 2} | change)


def test_what_is_given_without_change_is_served():
    assert route(LOGITS, top_k=2)[1].shape == (2, 2)
