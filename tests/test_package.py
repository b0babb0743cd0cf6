"""The frame of the two packages: what they import, what they export, what importing them does."""

import ast
import doctest
import importlib
import importlib.metadata
import pathlib
import pkgutil
import subprocess
import sys
import tomllib

import pytest

import moe_online
import pallas_kernels

pytestmark = pytest.mark.smoke

PACKAGES = (moe_online, pallas_kernels)
REPOSITORY = pathlib.Path(__file__).parents[1]
OPTIONAL = {"matplotlib", "torch", "transformers"}

# Runs in a new interpreter: imports one package and prints what else came with it.
IMPORT = """
import sys
import {package}
from jax._src import xla_bridge  # the public API has no question that does not itself start the backends

assert not xla_bridge.backends_are_initialized(), "importing {package} touched a device"
print(*sys.modules)
"""


def import_alone(source: str, *, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs `source` in a new interpreter in which every warning is an error."""
    return subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, cwd=cwd)


def imported_names(source: str) -> set[str]:
    """Top-level packages that this source imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {"moe_online"} & {node.value.partition(".")[0]}  # importlib.import_module("moe_online.x")
    return names


def exports(package) -> list[str]:
    """Names that the package's `__init__` hands on as `X as X`."""
    tree = ast.parse(pathlib.Path(package.__file__).read_text(encoding="utf-8"))
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]


def modules(package) -> list[str]:
    """Every module of the package; `__main__` runs when it is imported."""
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package.__name__, *(m.name for m in found if not m.name.endswith("__main__"))]


def test_imported_names_sees_every_kind_of_import():
    assert imported_names("import moe_online.config as c") == {"moe_online"}
    assert imported_names("def f():\n    from moe_online import load") == {"moe_online"}
    assert imported_names('importlib.import_module("moe_online.loading")') == {"moe_online"}
    assert imported_names("from . import moe_online") == set()
    assert imported_names('"""Never imports moe_online."""') == set()


def test_pallas_kernels_never_imports_moe_online():
    files = sorted(pathlib.Path(pallas_kernels.__file__).parent.rglob("*.py"))
    assert len(files) >= 6
    assert [str(f) for f in files if "moe_online" in imported_names(f.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("package", ["moe_online", "pallas_kernels"])
def test_import_touches_no_device_and_no_optional_dependency(package, tmp_path):
    run = import_alone(IMPORT.format(package=package), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert package in loaded
    assert loaded & OPTIONAL == set()
    if package == "pallas_kernels":
        assert "moe_online" not in loaded


def test_a_touched_device_is_noticed(tmp_path):
    (tmp_path / "touches.py").write_text("import jax\njax.devices()\n")
    run = import_alone(IMPORT.format(package="touches"), cwd=tmp_path)
    assert "importing touches touched a device" in run.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_public_names_are_documented(package):
    names = exports(package)
    assert names, f"{package.__name__} re-exports nothing as `X as X`"
    assert [name for name in ["__doc__", *names] if not (getattr(package, name).__doc__ or "").strip()] == []


@pytest.mark.parametrize("name", [name for package in PACKAGES for name in modules(package)])
def test_examples_in_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    assert doctest.testmod(module).failed == 0


def test_version_is_that_of_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.metadata.version("moe-online") == project["version"], "installed from other sources"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_typed_marker_is_installed(package):
    assert (pathlib.Path(package.__file__).parent / "py.typed").is_file()
