"""Builds sdist and wheel, checks both, and runs the README's quick start from the wheel alone."""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIRED = ["jax", "optax", "jaxtyping"]
IN_SDIST = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "benchmarks",
    "docs", "examples", "jaxsoftmax", "pyproject.toml", "tests",
}  # fmt: skip


def run(*command, **options):
    """What the command prints; its errors go to the terminal."""
    command = [str(part) for part in command]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def build(folder):
    """Makes an sdist, and a wheel from it, in the folder."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel).strip())
    return sdist, wheel


def check_contents(sdist, wheel):
    """The wheel holds the package and nothing else; the sdist what its tests need."""
    package = {f"jaxsoftmax/{path.name}" for path in (ROOT / "jaxsoftmax").iterdir() if path.is_file()}
    assert "jaxsoftmax/py.typed" in package, (
        "py.typed is missing: type checkers would pass the package over"
    )
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == package, f"the wheel holds {sorted(held ^ package)} too much or too little"
    with tarfile.open(sdist) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames()}
    assert tops >= IN_SDIST, f"the sdist lacks {sorted(IN_SDIST - tops)}"


def check_installed(python):
    """Only what is required is installed, and what pip would install with that."""
    report = run(
        python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
        "--report", "-", *REQUIRED,
    )  # fmt: skip
    expected = {normal(item["metadata"]["name"]) for item in json.loads(report)["install"]}
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    installed = {normal(item["name"]): item["version"] for item in listed}
    print("installed:", *(f"{name} {version}" for name, version in installed.items()))
    extra = set(installed) - expected - {"jaxsoftmax", "pip", "setuptools"}
    assert not extra, f"installed beyond {REQUIRED} and what they need: {sorted(extra)}"


def normal(name):
    """A distribution's name as the packaging rules compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_quick_start(python, folder):
    """The README's quick start prints what the README says, far from the source tree."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Quick start\n(.*?)^## ", readme, re.DOTALL | re.MULTILINE)[1]
    code, expected = (
        "".join(re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)) for kind in ("python", "text")
    )
    assert "import jaxsoftmax" in code
    assert expected
    code += "\nprint(js.__file__)\n"
    *printed, where = run(python, "-I", "-c", code, cwd=folder).splitlines(keepends=True)
    assert Path(where.strip()).is_relative_to(python.parents[1]), f"imported from {where}"
    assert "".join(printed) == expected, f"printed {printed}, the README says {expected!r}"


def main():
    """Runs all checks in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        sdist, wheel = build(folder / "dist")
        check_contents(sdist, wheel)
        venv.create(folder / "clean", with_pip=True)
        python = folder / "clean" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
        check_installed(python)
        empty = folder / "empty"
        empty.mkdir()
        check_quick_start(python, empty)
        print(f"{wheel.name} alone runs the quick start on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
