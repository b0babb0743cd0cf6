"""The whole command, once: what a newcomer sees."""

import json
import struct
import subprocess
import sys
from unittest import mock

import pytest

from moe_online.cli import comparison, main, quickstart
from moe_online.errors import ConfigError
from moe_online.method import OnlineMoEMethodBase, register_scheme
from moe_online.schemes import SHORTHANDS, QuantSpec

SCHEMES = ("bf16", "fp8_per_channel", "fp8_per_block", "int8_w8a16")
FIELDS = {"scheme", "weight", "activation", "stored_bytes", "peak_bytes", "bits_per_byte", "kl", "top1_agreement"}
COMMAND = "import sys; from moe_online.cli import main; sys.exit(main())"


@pytest.mark.slow  # .ci/run runs README's command itself
def test_what_a_newcomer_sees(tmp_path):
    """One test, because one run takes a minute, and parallel workers share no fixtures."""
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, "quickstart", "--json", "rows.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert [run.stdout.count(f"\n {scheme} ") for scheme in SCHEMES] == [1] * 4  # one table
    assert 'def read_config(path):\n    """' in run.stdout  # the completion
    assert str(tmp_path / quickstart.PICTURE) in run.stdout
    assert_picture(tmp_path / quickstart.PICTURE)
    rows = {row["scheme"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert tuple(rows) == SCHEMES
    assert_rows(rows)
    assert_quality(rows)
    assert_memory(rows)


def assert_picture(path):
    """A PNG of a size at which its text can be read."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    assert width > 1000
    assert height > 300


def assert_rows(rows):
    """The fields that machines rely on."""
    for row in rows.values():
        assert set(row) >= FIELDS | {"tokens_per_second", "seconds"}
        assert row["tokens_per_second"] > 1
        assert 0 < row["seconds"] < 60
    assert rows["bf16"] | {"weight": None, "activation": None, "kl": 0.0, "top1_agreement": 1.0} == rows["bf16"]
    formats = [(rows[scheme]["weight"], rows[scheme]["activation"]) for scheme in SCHEMES[1:]]
    assert formats == [
        ("fp8_per_channel", "fp8_per_token"),
        ("fp8_per_block", "fp8_per_group"),
        ("int8_per_channel", None),
    ]


def assert_quality(rows):
    """Quantized, which shows, and yet as good."""
    bf16 = rows["bf16"]["bits_per_byte"]
    assert bf16 < 2  # an untrained model needs 8
    for scheme in SCHEMES[1:]:
        assert abs(rows[scheme]["bits_per_byte"] / bf16 - 1) < 0.01
        # More than nothing: an unquantized model has 0. Rotating the experts by one costs more than 0.2 bits.
        assert 1e-5 < rows[scheme]["kl"] < 0.02
        assert 0.95 < rows[scheme]["top1_agreement"] < 1
    assert rows["int8_w8a16"]["kl"] < rows["fp8_per_channel"]["kl"]  # 8 significant bits against 4


def assert_memory(rows):
    """Experts in 8 bits, and never all of them in more."""
    for row in rows.values():
        assert row["stored_bytes"] <= row["peak_bytes"] <= row["planned_peak_bytes"]
    for scheme in SCHEMES[1:]:
        assert 0.55 < rows[scheme]["stored_bytes"] / rows["bf16"]["stored_bytes"] < 0.6  # experts are 87 % of the bytes
        assert rows[scheme]["peak_bytes"] < rows["bf16"]["stored_bytes"]


def test_all_schemes_without_their_aliases():
    assert comparison.schemes(everything=False) == list(SCHEMES)
    assert comparison.schemes(everything=True) == [
        *(*SCHEMES, "fp8_per_tensor", "fp8_w8a16", "int8_w8a8", "int8_per_channel_weight_only", "mxfp8", "mxfp4"),
        *("nvfp4_per_token", "int4_w4a16", "mxfp4_w4a16", "nvfp4_w4a16"),
    ]


def test_registered_schemes_are_compared_where_they_are_formats():
    with mock.patch.dict(SHORTHANDS):
        register_scheme("mine", QuantSpec("mxfp8", "int8_per_token"))
        register_scheme("a_method", OnlineMoEMethodBase)
        assert comparison.schemes(everything=True)[-1] == "mine"
        comparison.check_names(["mine"])
        with pytest.raises(ConfigError, match="unknown scheme 'a_method'"):
            comparison.check_names(["a_method"])


@pytest.fixture
def measured(monkeypatch):
    """The command with its measurements already done."""
    row = comparison.Row(
        scheme="fp8_per_block",
        aliases=(),
        linear=True,
        weight="fp8_per_block",
        activation="fp8_per_group",
        stored_bytes=1,
        peak_bytes=2,
        planned_peak_bytes=3,
        bits_per_byte=1.0,
        kl=0.0,
        top1_agreement=1.0,
        tokens_per_second=1.0,
        seconds=1.0,
    )
    result = [comparison.Measured(row=row, completion='Read [it]."""')]
    monkeypatch.setattr(quickstart, "_measure", lambda schemes: result)


@pytest.mark.smoke
@pytest.mark.usefixtures("measured")
def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moe_online.cli.picture.can_draw", lambda: False)
    assert main(["quickstart"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "No picture without matplotlib: pip install 'moe-online[plot]'"
    assert 'Read [it]."""' in out  # text as generated, not markup
    assert list(tmp_path.iterdir()) == []


@pytest.mark.smoke
@pytest.mark.usefixtures("measured")
def test_the_picture_goes_where_it_is_asked_for(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--plot", "table.svg"]) == 0
    assert (tmp_path / "table.svg").read_text().startswith("<?xml")
    assert str(tmp_path / "table.svg") in capsys.readouterr().out
