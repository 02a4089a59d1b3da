"""The wheel: built, installed into an empty environment, and used there without any environment
variable.
"""

import ast
import subprocess
from importlib import metadata
from pathlib import Path

import partita

ROOT = Path(__file__).parents[1]


def run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    command = [str(python), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=200
    )


def test_the_wheel_has_the_command_and_its_version(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "-m", "partita", "--version", folder=tmp_path)
    assert done.stdout.split() == ["partita", partita.__version__], done.stderr
    assert (installed.parent / "partita").exists()


def test_the_wheel_has_presets_and_page_assets(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "-m", "partita", "machine", "list", folder=tmp_path)
    presets = [path.stem for path in (ROOT / "partita/machine/presets").glob("*.toml")]
    assert done.returncode == 0, done.stderr
    assert [name for name in presets if name not in done.stdout] == []
    package = Path(str(metadata.Distribution.at(_dist_info(installed)).locate_file("partita")))
    sources = {
        path.relative_to(ROOT / "partita")
        for path in (ROOT / "partita").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert [str(path) for path in sorted(sources) if not (package / path).exists()] == []


def test_every_import_of_the_package_is_a_requirement_or_an_extra(installed: Path) -> None:
    requirements = metadata.Distribution.at(_dist_info(installed)).requires or []
    optional = {"orbax", "torch", "torch_geometric", "dgl", "ogb", "pymetis", "metis", "networkx"}
    optional |= {
        "tensorflow",
        "pyarrow",
        "pandas",
        "ray",
        "tf_keras",
        "etils",
        "IPython",
        "flax",
        "torchax",
        "optax",
        "sklearn",
    }
    site_packages = _dist_info(installed).parent
    missing = set()
    for path in (ROOT / "partita").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                is_present = bool(list(site_packages.glob(f"{top}*"))) or top in _standard_library()
                if not is_present and top not in optional:
                    missing.add(f"{path.relative_to(ROOT)} imports {name}")
    assert not missing, f"{sorted(missing)}; requirements are {requirements}"


def _standard_library() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


def _dist_info(python: Path) -> Path:
    return next(python.parents[1].glob("lib/python3.*/site-packages/partita-*.dist-info"))
