"""Schemes of one's own: registered, looked up, and what cannot be one."""

import dataclasses
import re
from unittest import mock

import pytest

from moe_online.config import MoEConfig, OnlineQuantConfig
from moe_online.errors import ConfigError
from moe_online.method import OnlineMoEMethodBase, get_method, register_scheme
from moe_online.schemes import SHORTHANDS, QuantSpec

MOE = MoEConfig(num_experts=4, top_k=2, hidden_size=160, intermediate_size=96)


class Halving(OnlineMoEMethodBase):
    """A scheme with arithmetic of its own: the output at half its size."""

    def process_weights_after_loading(self, weights):
        return dataclasses.replace(weights, w2_weight=weights.w2_weight / 2)


OWN = QuantSpec("mxfp8", "int8_per_token")


@pytest.fixture
def own_schemes():
    """Registers, and forgets when the test is over."""
    with mock.patch.dict(SHORTHANDS):
        register_scheme("my_formats", OWN)
        register_scheme("my_method", Halving)
        yield


@pytest.mark.usefixtures("own_schemes")
def test_schemes_of_ones_own():
    config = OnlineQuantConfig.parse("my_formats")
    assert get_method("my_formats", MOE).spec == OWN == config.moe == config.linear
    assert OnlineQuantConfig(targets={"x": "my_formats"}).resolve("x", "moe") == OWN
    method = get_method("my_method", MOE)
    assert isinstance(method, Halving)
    assert method.moe is MOE
    with pytest.raises(ConfigError, match="the method Halving, which says itself what becomes of shared experts"):
        get_method("my_method", MOE, shared="mxfp8")


@pytest.mark.usefixtures("own_schemes")
@pytest.mark.parametrize("config", ["my_method", {"moe": "my_method"}, {"targets": {"*": "my_method"}}], ids=str)
def test_configs_take_formats_only(config):
    says = "'my_method' is the method Halving, and loading and configs take formats only: load without quantization"
    with pytest.raises(ConfigError, match=says):
        OnlineQuantConfig.parse(config)


@pytest.mark.usefixtures("own_schemes")
def test_a_name_can_be_registered_again_where_that_is_meant():
    for scheme in (Halving, OWN):
        for taken in ("my_method", "my_formats"):
            with pytest.raises(ConfigError, match=f"a scheme '{taken}' already; choose another name, or give replace"):
                register_scheme(taken, scheme)
    register_scheme("my_method", OWN, replace=True)
    register_scheme("my_formats", Halving, replace=True)
    assert get_method("my_method", MOE).spec == OWN
    assert isinstance(get_method("my_formats", MOE), Halving)


@pytest.mark.usefixtures("own_schemes")
@pytest.mark.parametrize("taken", ["mxfp8", "fp8_per_block_static", "nvfp4", "int4_per_group_64", "fp8_per_token"])
def test_what_the_library_names_stays(taken):
    for scheme in (Halving, OWN):
        with pytest.raises(ConfigError, match=f"there is a scheme or format '{taken}' already"):
            register_scheme(taken, scheme, replace=True)


@pytest.mark.usefixtures("own_schemes")
@pytest.mark.parametrize("name", ["", "a,b", "a b", "a\n", "online", "bf16", "BF16", "none", "all", "auto"])
def test_names_that_no_scheme_can_have(name):
    for scheme in (Halving, OWN):
        with pytest.raises(ConfigError, match=re.escape(f"no scheme can have the name {name!r}")):
            register_scheme(name, scheme)


@pytest.mark.usefixtures("own_schemes")
def test_what_no_scheme_can_be():
    with pytest.raises(TypeError, match="a QuantSpec or a subclass of OnlineMoEMethodBase, not 3"):
        register_scheme("other", 3)
    with pytest.raises(TypeError, match=r"a scheme is named by a string, not int \(3\)"):
        register_scheme(3, OWN)
    with pytest.raises(ConfigError, match="has no weight format"):
        register_scheme("other", QuantSpec(None, "int8_per_token"))
    assert "other" not in SHORTHANDS
