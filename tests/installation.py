"""An environment with nothing but Partita's wheel and the packages that its metadata requires.

The packages are links to those of the tests' own environment, so that nothing is downloaded: a
dependency that `pyproject.toml` forgets is missing here, and so is a file that the wheel forgets.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, built into a folder."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "partita", source / "partita", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    return next(folder.glob("partita-*.whl"))


def required(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements need, directly or not, extras left out."""
    names: set[str] = set()
    open_requirements = [Requirement(text) for text in requirements]
    while open_requirements:
        requirement = open_requirements.pop()
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not is_needed or requirement.name in names:
            continue
        names.add(requirement.name)
        distribution = metadata.distribution(requirement.name)
        open_requirements += [Requirement(text) for text in distribution.requires or []]
    return names


def link_distribution(name: str, site_packages: Path) -> None:
    """Links the top-level files and folders of an installed distribution into a folder."""
    distribution = metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
    for top in tops - {"__pycache__"}:
        target = Path(str(distribution.locate_file(top)))
        link = site_packages / top
        if not link.exists():
            link.symlink_to(target)


def create(folder: Path) -> Path:
    """Creates the environment in a folder; returns its Python interpreter."""
    wheel = build_wheel(folder / "wheel")
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    python = folder / "environment/bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "environment/lib" / version / "site-packages"
    options = ["--quiet", "--no-deps", "--no-index"]
    _run("-m", "pip", "--python", str(python), "install", *options, str(wheel))
    partita = next(site_packages.glob("partita-*.dist-info"))
    requirements = metadata.Distribution.at(partita).requires or []
    for name in required(requirements):
        link_distribution(name, site_packages)
    return python


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
