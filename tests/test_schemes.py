"""What the names of schemes stand for, and what is refused."""

import copy
import pickle

import pytest

from moe_online.errors import CheckpointError, CheckpointNotFound, ConfigError, ShapeMismatch
from moe_online.schemes import DEFAULT_ACTIVATIONS, FORMAT_ALIASES, SHORTHANDS, QuantSpec, parse_scheme
from pallas_kernels import get_format
from pallas_kernels.formats import FORMATS

UNKNOWN = ["int4", "fp8_per_token", "bf16", "int4_per_group_16"]

# name: (weight, activation, whether linear layers get it too)
TABLE = {
    "fp8_per_tensor": ("fp8_per_tensor", "fp8_per_tensor_dynamic", True),
    "fp8": ("fp8_per_tensor", "fp8_per_tensor_dynamic", True),
    "fp8_per_channel": ("fp8_per_channel", "fp8_per_token", True),
    "fp8_per_block": ("fp8_per_block", "fp8_per_group", True),
    "fp8_w8a16": ("fp8_per_channel", None, True),
    "int8_w8a8": ("int8_per_channel", "int8_per_token", True),
    "int8_w8a16": ("int8_per_channel", None, True),
    "int8_per_channel_weight_only": ("int8_per_channel", None, False),
    "experts_int8": ("int8_per_channel", None, False),
    "mxfp8": ("mxfp8", "mxfp8", True),
    "mxfp4": ("mxfp4", "mxfp4", True),
    "nvfp4_per_token": ("nvfp4", "nvfp4_per_token", False),
    "int4_w4a16": ("int4_per_group", None, True),
    "mxfp4_w4a16": ("mxfp4", None, True),
    "nvfp4_w4a16": ("nvfp4", None, True),
}


def name(fmt):
    return None if fmt is None else fmt.name


@pytest.mark.smoke
def test_shorthands():
    assert set(SHORTHANDS) == set(TABLE)
    for shorthand, (weight, activation, linear) in TABLE.items():
        spec = parse_scheme(shorthand)
        assert (name(spec.weight), name(spec.activation)) == (weight, activation)
        assert SHORTHANDS[shorthand].linear == (spec if linear else None)


def test_every_weight_format_has_a_default_activation():
    assert set(DEFAULT_ACTIVATIONS) == {fmt.name for fmt in FORMATS.values() if "weight" in fmt.roles}
    for weight, activation in DEFAULT_ACTIVATIONS.items():
        assert parse_scheme(weight) == QuantSpec(weight, activation) == parse_scheme({"weight": weight})


def test_aliases_name_present_formats():
    assert set(FORMAT_ALIASES.values()) <= set(FORMATS)
    assert QuantSpec("fp8_per_block_static", "fp8_per_block_dynamic") == QuantSpec("fp8_per_block", "fp8_per_group")
    assert QuantSpec("fp8_per_channel_static", None) == QuantSpec("fp8_per_channel", None)
    assert parse_scheme("int8_per_channel_static") == QuantSpec("int8_per_channel", None)
    assert parse_scheme("fp8_per_tensor_static") == parse_scheme("fp8_per_tensor")


@pytest.mark.parametrize("group", [32, 64])
def test_groups_can_be_named(group):
    """Every way to say it is the same, and what is printed can be read again."""
    fmt = get_format("int4_per_group", group=group)
    spec = QuantSpec(f"int4_per_group_{group}", None)
    assert spec.weight == fmt
    assert parse_scheme(f"int4_per_group_{group}") == spec
    assert parse_scheme({"weight": "int4_per_group", "group": group}) == spec
    assert parse_scheme({"group": group}, base=QuantSpec("int4_per_group", None)) == spec
    assert QuantSpec(str(spec.weight), None) == spec
    assert str(spec) == f"int4_per_group_{group} / none"


def test_groups_that_do_not_exist():
    assert parse_scheme({"weight": "int4_per_group", "group": None}).weight.group == 128
    with pytest.raises(ConfigError, match="group=16 of format 'int4_per_group' must be one of 32, 64, 128"):
        parse_scheme({"weight": "int4_per_group", "group": 16})
    with pytest.raises(ConfigError, match="group=64: the block of format 'fp8_per_block' is fixed"):
        parse_scheme({"weight": "fp8_per_block", "group": 64})
    with pytest.raises(TypeError, match=r"group is a whole number, not float \(64.0\)"):
        parse_scheme({"weight": "int4_per_group", "group": 64.0})
    with pytest.raises(ConfigError, match=r"unknown weight format 'int4_per_group_16'; .* int4_per_group_32, "):
        QuantSpec("int4_per_group_16", None)


def test_spec_takes_names_and_formats():
    spec = QuantSpec(get_format("fp8_per_block"), "fp8_per_token")
    assert spec == QuantSpec("fp8_per_block", get_format("fp8_per_token"))
    assert hash(spec) == hash(QuantSpec("fp8_per_block", "fp8_per_token"))
    assert spec.weight is get_format("fp8_per_block")
    assert QuantSpec(None, None).weight is None
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec


def test_spec_prints():
    assert str(QuantSpec("int8_per_channel", None)) == "int8_per_channel / none"
    assert repr(QuantSpec("int8_per_channel", None)) == "QuantSpec(weight='int8_per_channel', activation=None)"


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_unknown_names_are_refused_with_the_valid_ones(unknown):
    with pytest.raises(
        ConfigError, match=rf"unknown quantization scheme '{unknown}'; valid names: experts_int8, fp8, "
    ):
        parse_scheme(unknown)


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        ("int3", None, "unknown weight format 'int3'; valid names: fp8_per_block, fp8_per_channel, fp8_per_tensor"),
        ("fp8_per_block", "int4", "unknown activation format 'int4'; valid names: fp8_per_group, fp8_per_tensor_dyn"),
        ("fp8_per_token", None, "'fp8_per_token' is no weight format"),
        ("fp8_per_block", "fp8_per_block", "'fp8_per_block' is no activation format"),
        (get_format("fp8_per_token"), None, "'fp8_per_token' is no weight format"),
    ],
)
def test_a_format_must_exist_and_fit_its_role(weight, activation, message):
    with pytest.raises(ConfigError, match=message):
        QuantSpec(weight, activation)


@pytest.mark.parametrize("value", [3, ["fp8_per_block"]])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="a format is named by a string, not"):
        QuantSpec(value, None)
    with pytest.raises(TypeError, match="a format is named by a string, not"):
        parse_scheme({"weight": value})
    with pytest.raises(TypeError, match="a scheme is a name, a QuantSpec or a dict"):
        parse_scheme(value)


def test_fields():
    base = QuantSpec("int8_per_channel", "int8_per_token")
    assert parse_scheme({"weight": "fp8_per_block"}) == QuantSpec("fp8_per_block", "fp8_per_group")
    assert parse_scheme({"weight": "fp8_per_block", "activation": None}) == QuantSpec("fp8_per_block", None)
    assert parse_scheme({"weight": get_format("fp8_per_block"), "activation": "fp8_per_token"}) == QuantSpec(
        "fp8_per_block", "fp8_per_token"
    )
    assert parse_scheme({}, base=base) == base
    assert parse_scheme({"activation": None}, base=base) == QuantSpec("int8_per_channel", None)
    assert parse_scheme({"weight": "fp8_per_channel"}, base=base) == QuantSpec("fp8_per_channel", "int8_per_token")


def test_fields_without_a_weight_or_with_another_key_are_refused():
    with pytest.raises(ConfigError, match=r"has no weight format; valid names: fp8_per_block, fp8_per_channel, fp8_"):
        parse_scheme({"activation": "fp8_per_token"})
    with pytest.raises(ConfigError, match="has no weight format"):
        parse_scheme({"weight": None}, base=QuantSpec("fp8_per_block", None))
    with pytest.raises(ConfigError, match="has no weight format; leave the scheme out"):
        parse_scheme(QuantSpec(None, "fp8_per_token"))
    with pytest.raises(ConfigError, match=r"unknown keys \['weights'\].*valid keys: weight, group, activation"):
        parse_scheme({"weights": "fp8_per_block"})


def test_a_shorthand_without_a_slot_is_refused():
    with pytest.raises(
        ConfigError, match="'experts_int8' does not define a linear spec; those that do: fp8, fp8_per_block"
    ):
        parse_scheme("experts_int8", kind="linear")


def test_errors_carry_names():
    error = ShapeMismatch("two shapes differ", names=iter(["a", "b"]))
    assert (str(error), error.names) == ("two shapes differ", ("a", "b"))
    assert pickle.loads(pickle.dumps(error)).names == ("a", "b")
    assert CheckpointError("unreadable").names == ()
    missing = CheckpointNotFound("no checkpoint at /x", names=["y"])
    assert isinstance(missing, FileNotFoundError)
    assert isinstance(missing, CheckpointError)
    assert (str(missing), missing.names) == ("no checkpoint at /x", ("y",))
