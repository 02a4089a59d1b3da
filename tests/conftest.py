"""Every test sees eight virtual CPU devices of one thread each, whatever it imports first."""

import fcntl
import gc
import os
import sys
import time
from pathlib import Path

import hypothesis
import installation
import pytest

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Machine code that compiles in a fifth of the time and runs slower; the partitioner is the same.
# The documentation's examples run without.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["PARTITA_CACHE"] = "/dev/null/none"  # nothing that was measured on this machine
os.environ["NPROC"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Without stored bytecode, every process compiles Partita again, and every worker the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A loaded machine draws examples slowly.
hypothesis.settings.register_profile(
    "loaded", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("loaded")

SECONDS_BETWEEN_FREEZES = 20.0
last_freeze = 0.0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Takes the objects of imports and of earlier tests out of garbage collection: a quarter of the time of tests that compile."""
    global last_freeze
    if time.monotonic() - last_freeze > SECONDS_BETWEEN_FREEZES:
        gc.collect()
        gc.freeze()
        last_freeze = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the tests that start processes first: the short ones after them end together."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def quick_processes() -> None:
    """Hides scikit-learn from processes that tests start. It is a fifth of what they import."""
    inherited = os.environ.get("PYTHONPATH")
    folders = [str(Path(__file__).parent / "absent"), *([inherited] if inherited else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with Partita's wheel and its requirements alone.

    The processes of `pytest -n` share one, and with it the kernels that numba compiles.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return installation.create(tmp_path_factory.mktemp("installation"))
    folder = tmp_path_factory.getbasetemp().parent / "installation"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = folder / "environment/bin/python"
        if not (folder / "complete").exists():
            assert installation.create(folder) == python
            (folder / "complete").touch()
    return python


SCRIPT = """
import keras, numpy as np
model = keras.Sequential([keras.layers.Dense(256, activation="relu", name="wide"), keras.layers.Dense(4, name="out")])
model.compile("sgd", "mse")
x = np.ones((64, 64), "float32")
model.fit(x, x[:, :4], batch_size=32, verbose=0)
"""


@pytest.fixture
def training(tmp_path: Path) -> str:
    """The path of a small script that trains."""
    (tmp_path / "training.py").write_text(SCRIPT)
    return str(tmp_path / "training.py")
