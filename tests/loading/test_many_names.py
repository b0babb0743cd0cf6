"""Checkpoints of 64,000 tensors: planning and reading cost a small multiple of the least loop over their names."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import moe_online
from moe_online.experts import abstract_experts
from moe_online.loading import get_mapping, mapping
from moe_online.loading.reader import Reader
from moe_online.loading.rules import parse_rules
from moe_online.loading.source import StoredTensor
from sources import BF16

pytestmark = pytest.mark.timing
LAYERS, E, H, INNER = 60, 350, 8, 8
RULES = get_mapping("qwen3_moe")


class Names:
    """What the checkpoint of a Qwen3-MoE looks like; all its elements are zero."""

    description = "many names"

    def __init__(self, layers=LAYERS):
        self.layers, self.tensors = layers, {}
        self.add("model.embed_tokens.weight", 16, H)
        self.add("model.norm.weight", H)
        for layer in range(layers):
            name = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
                self.add(f"{name}.{norm}.weight", H)
            for letter in "qkvo":
                self.add(f"{name}.self_attn.{letter}_proj.weight", H, H)
            self.add(f"{name}.mlp.gate.weight", E, H)
            for e in range(E):
                for projection in ("gate_proj", "up_proj"):
                    self.add(f"{name}.mlp.experts.{e}.{projection}.weight", INNER, H)
                self.add(f"{name}.mlp.experts.{e}.down_proj.weight", H, INNER)

    def add(self, name, *shape):
        self.tensors[name] = StoredTensor(name=name, shape=shape, dtype=BF16, chunk=(1, *shape[1:]))

    def read(self, name, index):
        part = np.empty([s.stop - s.start for s in index], BF16)
        self.read_into(name, index, part)
        return part

    def read_into(self, name, index, out):
        out[...] = 0


def declared(layers):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, BF16)

    def layer():
        kernels = {f"{letter}_proj": {"kernel": leaf(H, H)} for letter in "qkvo"}
        norms = {f"{letter}_norm": {"scale": leaf(H)} for letter in "qk"}
        return {
            "attention_norm": {"scale": leaf(H)},
            "attention": kernels | norms,
            "moe_norm": {"scale": leaf(H)},
            "moe": {"router": {"kernel": leaf(H, E)}, "experts": abstract_experts(E, H, INNER, BF16)},
        }

    whole = {"embed": {"embedding": leaf(16, H)}, "norm": {"scale": leaf(H)}}
    return whole | {"layers": {str(i): layer() for i in range(layers)}}


@pytest.fixture(scope="module")
def names():
    return Names()


def seconds(function, repeats=2):
    """The least of several times, of this process alone."""

    def once():
        begin = time.process_time()
        function()
        return time.process_time() - begin

    return min(once() for _ in range(repeats))


def planned(names):
    return moe_online.plan(declared(names.layers), names, mapping=RULES, quantization="fp8_per_channel")


def matched(names):
    """Which rule each name follows: the least that planning has to find out."""
    patterns = [rule.regex for rule in parse_rules(RULES)]
    return [[pattern for pattern in patterns if pattern.fullmatch(name)] for name in names.tensors]


def check_planning(names):
    taken, least = seconds(lambda: planned(names)), seconds(lambda: matched(names))
    print({"planning": taken, "matching": least, "names": len(names.tensors)})
    assert taken < 15 * least, f"planning took {taken:.1f} s, matching the names {least:.1f} s"


def test_planning(names):
    assert len(names.tensors) > 63_000
    assert len(planned(names).units) == 2 + 11 * LAYERS
    check_planning(names)


def test_what_costs_much_for_each_name_is_noticed(monkeypatch):
    claims = mapping._claims

    def slow(*args):
        sorted(range(20_000))  # about a third of a millisecond
        return claims(*args)

    monkeypatch.setattr(mapping, "_claims", slow)
    with pytest.raises(AssertionError, match="planning took"):
        check_planning(Names(layers=10))


def read_all(names, plan):
    reader = Reader(names, plan.units)
    try:
        for unit in plan.units:
            reader.read(unit)
    finally:
        reader.close()


def read_each(names):
    """Each tensor by a thread of a pool: the least that reading in parallel takes."""
    with ThreadPoolExecutor(8) as pool:
        jobs = []
        for name, tensor in names.tensors.items():
            index = tuple(slice(0, size) for size in tensor.shape)
            jobs.append(pool.submit(names.read_into, name, index, np.empty(tensor.shape, BF16)))
        for job in jobs:
            job.result()


def check_reading(names, plan):
    taken, least = seconds(lambda: read_all(names, plan)), seconds(lambda: read_each(names))
    print({"reading": taken, "a loop": least})
    assert taken < 5 * least, f"reading took {taken:.1f} s, a loop {least:.1f} s"


def test_reading(names):
    check_reading(names, planned(names))


def test_a_slow_reader_is_noticed(monkeypatch):
    names, read_into = Names(layers=10), Reader._read_into

    def slow(*args):
        sorted(range(20_000))
        return read_into(*args)

    monkeypatch.setattr(Reader, "_read_into", slow)
    with pytest.raises(AssertionError, match="reading took"):
        check_reading(names, planned(names))
