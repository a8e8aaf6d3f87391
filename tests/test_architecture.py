"""The shape of the package: who imports whom, what importing does, what is public."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxsoftmax as js

PACKAGE = Path(js.__file__).parent
# Each module imports only from modules before it in its list; the lists know nothing of each other.
ORDER = ["_checks", "_mesh", "_rows", "_softmax", "_cost", "_blocks", "_head", "_network", "__init__"]
ALONE = [
    ["_version"],
    ["_training"],
    ["_rules", "_differences", "_comparison", "_linearity", "_gradients"],
]


def imported(name):
    """The modules of the package that module `name` imports."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("jaxsoftmax")):
            yield node.module.removeprefix("jaxsoftmax.")
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("jaxsoftmax"))


def test_every_module_has_its_place():
    # `__main__` uses the public names like any program.
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*itertools.chain(ORDER, *ALONE), "__main__"}
    assert set(imported("__main__")) == {"jaxsoftmax"}


@pytest.mark.parametrize("name", [*itertools.chain(ORDER, *ALONE)])
def test_modules_import_only_from_their_left(name):
    row = next(row for row in [ORDER, *ALONE] if name in row)
    allowed = {*row[: row.index(name)], *itertools.chain(*(ALONE if name == "__init__" else []))}
    assert set(imported(name)) <= allowed


def test_init_is_names_only():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert isinstance(tree.body[0], ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in tree.body[1:])


def test_version_and_repository_are_said_once():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    for name in ("README.md", "CITATION.cff"):
        assert repository in (root / name).read_text(encoding="utf-8")
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev0)?", js.__version__)


def test_import_starts_no_backend():
    code = (
        "import jaxsoftmax, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
