"""What goes wrong says so in one message, without a traceback, and with the right exit status."""

import shutil
import subprocess
import sys

import pytest

from moe_online.assets import PYTHON_MOE_7M
from moe_online.cli import inspect, main

COMMAND = "import sys; from moe_online.cli import main; sys.exit(main())"
TRUNCATED = """
import sys
from moe_online import cli, models
from moe_online.cli import inspect
inspect.run = lambda args: models.load(args.path, progress=False)  # the shortest command that reads weights
sys.exit(cli.main())
"""


def run(*arguments, source=COMMAND, cwd=None):
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-c", source, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def assert_one_message(done, *pieces):
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("moe-online: error: ")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    for piece in pieces:
        assert piece in done.stderr


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        pytest.param(["inspect", "nowhere"], ["nothing at", "nowhere"], marks=pytest.mark.smoke),
        (["inspect", "folder"], ["is no Orbax checkpoint"]),
        (["inspect", PYTHON_MOE_7M, "--scheme", "fp9"], ["'fp9'", "valid names", "fp8_per_block"]),
        (["inspect", PYTHON_MOE_7M / "checkpoint", "--scheme", "fp9"], ["'fp9'", "valid names", "fp8_per_block"]),
        (["inspect", PYTHON_MOE_7M / "checkpoint", "--prefix", "nope"], ["nope", "params"]),
        (["inspect", PYTHON_MOE_7M, "--prefix", "params"], ["--prefix", "checkpoint"]),
        (["inspect", PYTHON_MOE_7M, "--json", "nowhere/x.json"], ["nowhere/x.json", "no folder"]),
        (["quickstart", "--json", "folder"], ["folder", "name of a file"]),
        (["quickstart", "--plot", "x.txt"], ["x.txt", "png"]),
    ],
    ids=lambda value: " ".join(str(v) for v in value)[-40:],
)
def test_one_readable_message(arguments, pieces, tmp_path):
    (tmp_path / "folder").mkdir()
    assert_one_message(run(*arguments, cwd=tmp_path), *pieces)


def test_truncated_checkpoint(tmp_path):
    shutil.copytree(PYTHON_MOE_7M, tmp_path / "model")
    (data,) = (file for file in tmp_path.rglob("d/*") if file.stat().st_size > 2**20)
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    assert_one_message(run("inspect", tmp_path / "model", source=TRUNCATED), "is damaged", "cannot be read")


def test_damaged_metadata(tmp_path):
    shutil.copytree(PYTHON_MOE_7M, tmp_path / "model")
    (tmp_path / "model" / "checkpoint" / "state" / "_METADATA").write_text("{")
    assert_one_message(run("inspect", tmp_path / "model"), "metadata", "cannot be read")


def test_a_full_disk(tmp_path):
    full = tmp_path / "full.json"
    full.symlink_to("/dev/full")  # every write to it fails as on a full disk
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    done = run("inspect", PYTHON_MOE_7M, "--json", full)
    assert done.returncode == 1
    assert done.stderr == "moe-online: error: No space left on device\n"


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["inspect"], ["quickstart", "extra"]])
def test_usage_errors_are_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: moe-online" in capsys.readouterr().err


@pytest.mark.smoke
def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("moe-online 0.")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "secret"), 1, "moe-online: error: secret: Permission denied\n"),
    ],
    ids=["interrupt", "permission"],
)
def test_status_of_what_a_command_raises(error, status, message, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(inspect, "run", fail)
    assert main(["inspect", "anything"]) == status
    assert capsys.readouterr().err == message


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    def fail(args):
        raise AssertionError("a defect")

    monkeypatch.setattr(inspect, "run", fail)
    with pytest.raises(AssertionError, match="a defect"):
        main(["inspect", "anything"])


@pytest.mark.smoke
def test_importing_the_command_starts_nothing():
    done = run(
        source="import sys, moe_online.cli\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "print('matplotlib' in sys.modules, 'moe_online.cli.comparison' in sys.modules)"
    )
    assert done.stdout == "False False\n", done.stderr
