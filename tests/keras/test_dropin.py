"""Keras under other names: `partita.keras` trains in parallel, `tensorflow.keras` in a script is
Keras 3. Each in a fresh interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MODEL = """
    x = np.random.default_rng(0).normal(size=(64, 256)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(2048, activation="relu"), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    model.fit(x, x[:, :4], batch_size=32, epochs=2, verbose=0, shuffle=False)
    print("devices", len(model.layers[0].kernel.value.sharding.device_set))
    print("loss", repr(float(model.evaluate(x, x[:, :4], verbose=0))))
"""


def python(code: str, folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter, with `partita` and its arguments if `command` is
    given.
    """
    (folder / "script.py").write_text(textwrap.dedent(code))
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("JAX_NUM_CPU_DEVICES", "NPROC", "KERAS_BACKEND")
    } | more
    start = (
        [sys.executable, "-m", "partita", command[0], "script.py", *command[1:]]
        if command
        else [sys.executable, "script.py"]
    )
    return subprocess.run(
        start, capture_output=True, text=True, timeout=200, cwd=folder, env=environment
    )


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: float(line[1]) for line in lines if line[0] in ("devices", "loss")}


def test_partita_keras_is_all_of_keras_and_trains_in_parallel(tmp_path: Path) -> None:
    start = "import numpy as np\n    import partita.keras as keras\n    from partita.keras.layers import Dense\n    import partita.keras.ops"
    more = "\n    import keras as plain\n    assert plain.layers.Dense is Dense and plain.layers.__spec__.name == 'keras.layers', plain.layers.__spec__"
    split = python(f"\n    {start}\n{MODEL}{more}", tmp_path, JAX_NUM_CPU_DEVICES="2")
    plain = python(f"\n    import numpy as np, keras\n{MODEL}", tmp_path, KERAS_BACKEND="jax")
    assert figures(split)["devices"] == 2
    assert figures(plain)["devices"] == 1
    assert figures(split)["loss"] == pytest.approx(figures(plain)["loss"], rel=1e-5)
    assert "partita: 'sequential' on host" in split.stderr
    assert "partita" not in plain.stderr


def test_partita_keras_names_what_it_lacks_as_keras_does(tmp_path: Path) -> None:
    done = python(
        "import partita.keras as keras\ntry: keras.nonsense\nexcept AttributeError as e: print(e)\nimport partita.keras.nonsense",
        tmp_path,
    )
    assert "has no attribute 'nonsense'" in done.stdout
    assert "ModuleNotFoundError: No module named 'partita.keras.nonsense'" in done.stderr


def test_partita_run_is_not_changed_by_a_script_that_imports_partita_keras(tmp_path: Path) -> None:
    done = python(
        f"\n    import numpy as np\n    import partita.keras as keras\n{MODEL}",
        tmp_path,
        "run",
        "--devices",
        "2",
        "--save-plan",
        "p.json",
    )
    assert figures(done)["devices"] == 2
    assert (tmp_path / "p.json").exists()
    assert done.stderr.count("predicted (") == 1, "it is planned once, by the command"


SPELLINGS = [
    "from tensorflow import keras",
    "import tensorflow as tf\n    keras = tf.keras\n    print('version', tf.__version__)",
    "import tf_keras as keras",
    "from tensorflow import keras\n    from tensorflow.keras.layers import Dense\n    assert Dense is keras.layers.Dense",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_script_with_tensorflows_spelling_runs_without_tensorflow(
    spelling: str, tmp_path: Path
) -> None:
    done = python(
        f"\n    import numpy as np\n    {spelling}\n{MODEL}", tmp_path, "run", "--devices", "2"
    )
    assert figures(done)["devices"] == 2


def test_what_the_alias_cannot_serve_says_what_to_install(tmp_path: Path) -> None:
    done = python("import tensorflow as tf\ntf.constant(1)", tmp_path, "run", "--devices", "2")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("Install it with: pip install tensorflow")


def test_partita_keras_asks_for_jax_before_anything_else_imports_keras(tmp_path: Path) -> None:
    done = python(
        "import partita.keras\nimport keras\nprint('backend', keras.config.backend())", tmp_path
    )
    assert done.stdout.split() == ["backend", "jax"], done.stderr


TENSORFLOW = """
    class errors: NotFoundError = type("NotFoundError", (Exception,), {"__module__": "tensorflow.errors"})
    from tensorflow.python.tape import gradient
"""


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("tf.gradient(None)", True),
        ("raise TypeError(\"Cannot interpret 'tf.float32' as a data type\")", True),
        ("raise tf.errors.NotFoundError", False),
        ("raise ValueError", False),
    ],
)
def test_what_tensorflow_cannot_do_on_jax_says_what_to_write(
    line: str, hint: bool, tmp_path: Path
) -> None:
    (tmp_path / "tensorflow/python").mkdir(parents=True)
    (tmp_path / "tensorflow/__init__.py").write_text(textwrap.dedent(TENSORFLOW))
    (tmp_path / "tensorflow/python/tape.py").write_text("def gradient(loss): return loss._id\n")
    done = python(f"import tensorflow as tf\n{line}", tmp_path, "run", "--devices", "2")
    assert done.returncode == 1
    assert ("Keras runs on JAX here. TensorFlow's own operations" in done.stderr) == hint, (
        done.stderr
    )


STEP = """
    import jax, jax.numpy as jnp
    import partita

    def train_step(w, x):
        loss, g = jax.value_and_grad(lambda w: jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"]) ** 2))(w)
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, g), loss

    w = {"a": jnp.ones((256, 2048)) / 256, "b": jnp.ones((2048, 8)) / 2048}
    x = jnp.ones((64, 256))
    step = partita.parallelize(train_step, (w, x))
    for _ in range(4):
        w, loss = step(w, x)
    print("devices", len(w["a"].sharding.device_set))
    print("loss", float(loss))
"""


def test_a_jax_script_takes_the_commands_devices_and_plan(tmp_path: Path) -> None:
    planned = python(STEP, tmp_path, "plan", "--machine", "k80-cluster:1", "--json")
    assert planned.returncode == 0 and '"w/a"' in planned.stdout, planned.stderr
    assert "devices" not in planned.stdout.splitlines(), "the script went on"
    split = python(
        STEP, tmp_path, "run", "--devices", "2", "--save-plan", "p.json", "--report", "r.html"
    )
    assert figures(split)["devices"] == 2
    assert "'train_step'" in split.stderr and "a step measured" in split.stderr
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()
    again = python(STEP, tmp_path, "run", "--plan", "p.json")
    assert figures(again) == figures(split)
