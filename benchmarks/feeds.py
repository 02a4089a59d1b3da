"""Data and models that come from TensorFlow and PyTorch, on 1 and 2 devices, against plain Keras on
one.

    python benchmarks/feeds.py                  # all; about 5 minutes
    python benchmarks/feeds.py tf.data DataLoader

It needs tensorflow and torch beside Partita, in an environment of its own: neither is among
Partita's dependencies. Each script runs under Python itself with KERAS_BACKEND=jax, then twice
under `partita run`, without it. A line tells the largest relative difference of a figure: the
losses of all epochs, with validation, `evaluate`, the sum of `predict`, the sum of the weights.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

TOLERANCE = 1e-4
HEAD = """
import numpy as np
{imports}

random = np.random.default_rng(0)
x = random.normal(size=(200, 256)).astype("float32")
y = (x[:, :4] ** 2).astype("float32")
keras.utils.set_random_seed(0)
wide = keras.layers.Dense(2048, activation="relu")
model = keras.Sequential([wide, keras.layers.Dense(4)])
model.compile("adam", "mse", metrics=["mae"])
"""
TAIL = """
values = [v for key in sorted(history) for v in history[key]]
values += [*model.evaluate(x, y, verbose=0), np.abs(model.predict(x[:7], verbose=0)).sum(), sum(np.abs(w).sum() for w in model.get_weights())]
print("backend", keras.config.backend())
print("devices", len(wide.kernel.value.sharding.device_set))
print("figures", *(repr(float(v)) for v in values))
"""
KERAS = "import keras"
TF = "import keras\nimport tensorflow as tf"
TORCH = "import keras\nimport torch\nfrom torch.utils.data import DataLoader, IterableDataset, TensorDataset"
ARRAYS = (
    "history = model.fit(x, y, batch_size=48, epochs=3, verbose=0, validation_split=0.1).history"
)
SLICES = "tf.data.Dataset.from_tensor_slices((x, y))"
SAMPLES = "TensorDataset(torch.from_numpy(x), torch.from_numpy(y))"
FEEDS = {
    "from tensorflow import keras": ("from tensorflow import keras", ARRAYS),
    "import tensorflow as tf": (
        "import tensorflow as tf\nkeras = tf.keras\nfrom tensorflow.keras.layers import Dense",
        ARRAYS,
    ),
    "import tf_keras": ("import tf_keras as keras", ARRAYS),
    "tf.data, last batch smaller": (
        TF,
        f"""
data = {SLICES}.shuffle(200, seed=1).batch(48).prefetch(2)
history = model.fit(data, epochs=3, verbose=0, validation_data={SLICES}.batch(64)).history
history["evaluated"] = model.evaluate({SLICES}.batch(48), verbose=0)
history["predicted"] = [np.abs(model.predict(tf.data.Dataset.from_tensor_slices(x).batch(48), verbose=0)).sum()]
""",
    ),
    "tf.data, repeated": (
        TF,
        f"history = model.fit({SLICES}.shuffle(64, seed=1).repeat().batch(48), steps_per_epoch=5, epochs=3, verbose=0).history",
    ),
    "tf.data, repeated twice": (
        TF,
        f"history = model.fit({SLICES}.repeat(2).shuffle(64, seed=1).batch(48), epochs=2, verbose=0).history",
    ),
    "tf.data, mapped, with weights": (
        TF,
        f"""
data = {SLICES}.map(lambda a, b: (tf.cast(a, tf.float32) * 2, b, tf.reduce_sum(b)), num_parallel_calls=2).batch(48)
history = model.fit(data, epochs=3, verbose=0).history
""",
    ),
    "tf.data from a generator": (
        TF,
        """
rows = lambda: ((x[i : i + 48], y[i : i + 48]) for i in range(0, 200, 48))
shapes = (tf.TensorSpec((None, 256)), tf.TensorSpec((None, 4)))
history = model.fit(tf.data.Dataset.from_generator(rows, output_signature=shapes), epochs=3, verbose=0).history
""",
    ),
    "tf tensors": (
        TF,
        """
history = model.fit(tf.constant(x), tf.constant(y), batch_size=48, epochs=3, verbose=0).history
history["evaluated"] = model.evaluate(tf.constant(x), tf.constant(y), verbose=0)
history["predicted"] = [np.abs(model.predict(tf.constant(x), verbose=0)).sum()]
""",
    ),
    "DataLoader, last batch smaller": (
        TORCH,
        f"""
data = DataLoader({SAMPLES}, batch_size=48, shuffle=True, generator=torch.Generator().manual_seed(1))
history = model.fit(data, epochs=3, verbose=0, validation_data=DataLoader({SAMPLES}, batch_size=64)).history
history["evaluated"] = model.evaluate(DataLoader({SAMPLES}, batch_size=48), verbose=0)
history["predicted"] = [np.abs(model.predict(DataLoader({SAMPLES}, batch_size=48), verbose=0)).sum()]
""",
    ),
    "DataLoader with workers": (
        TORCH,
        f"history = model.fit(DataLoader({SAMPLES}, batch_size=48, num_workers=2), epochs=2, verbose=0).history",
    ),
    "DataLoader of a stream": (
        TORCH,
        """
class Stream(IterableDataset):
    def __iter__(self):
        return zip(x, y)

history = model.fit(DataLoader(Stream(), batch_size=48), epochs=1, verbose=0).history
""",
    ),
    "torch tensors": (
        TORCH,
        """
history = model.fit(torch.from_numpy(x), torch.from_numpy(y), batch_size=48, epochs=3, verbose=0).history
history["evaluated"] = model.evaluate(torch.from_numpy(x), torch.from_numpy(y), verbose=0)
history["predicted"] = [np.abs(model.predict(torch.from_numpy(x), verbose=0)).sum()]
""",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("feeds", nargs="*", help="parts of the names of those to run; default: all")
    given = parser.parse_args()
    missing = [name for name in ("tensorflow", "torch") if find_spec(name) is None]
    if missing:
        print(
            f"{' and '.join(missing)} must be installed beside Partita for this. Run: pip install tensorflow-cpu torch",
            file=sys.stderr,
        )
        return 2
    chosen = [
        name for name in FEEDS if not given.feeds or any(part in name for part in given.feeds)
    ]
    installed = {name: _version(name) for name in ("keras", "jax", "tensorflow", "torch")}
    print(", ".join(f"{name} {number}" for name, number in installed.items()))
    failed = sum(not agrees(name, *FEEDS[name]) for name in chosen)
    print(f"{len(chosen) - failed} of {len(chosen)} train as plain Keras does")
    return 1 if failed else 0


def agrees(name: str, imports: str, fit: str) -> bool:
    """Whether a script computes on 1 and 2 devices what plain Keras computes; prints a line."""
    with tempfile.TemporaryDirectory() as folder:
        text = HEAD.format(imports=imports) + fit + TAIL
        (Path(folder) / "train.py").write_text(text, encoding="utf-8")
        # what Keras knows by no other name than its own, plain Keras is asked for by that name
        (Path(folder) / "plain.py").write_text(
            text.replace("import tf_keras as keras", KERAS), encoding="utf-8"
        )
        plain = run(folder, ["plain.py"], KERAS_BACKEND="jax")
        split = {
            n: run(folder, ["-m", "partita", "run", "--quiet", "--devices", str(n), "train.py"])
            for n in (1, 2)
        }
    errors = [found for found in (plain, *split.values()) if isinstance(found, str)]
    if errors:
        print(f"{name:32} FAILED: {errors[0]}", flush=True)
        return False
    differences = {n: difference(plain[2], found[2]) for n, found in split.items()}
    right = (
        all(found[0] == "jax" and found[1] == n for n, found in split.items())
        and max(differences.values()) < TOLERANCE
    )
    said = ", ".join(
        f"{split[n][1]} device{'s' if n > 1 else ''} {d:.1e}" for n, d in differences.items()
    )
    print(f"{name:32} {'same' if right else 'DIFFERS'}: {said}", flush=True)
    return right


def run(folder: str, command: list[str], **more: str) -> tuple[str, int, list[float]] | str:
    """Backend, number of devices and figures that a script prints; the last line of its error
    where it fails.
    """
    environment = (
        {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "KERAS_BACKEND")}
        | more
        | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    )
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = dict(re.findall(r"^(backend|devices|figures) (.*)$", done.stdout, re.M))
    if done.returncode or len(said) < 3:
        return f"{' '.join(command)}: {(done.stderr.strip() or 'it printed no figures').splitlines()[-1]}"
    return said["backend"], int(said["devices"]), [float(v) for v in said["figures"].split()]


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two lists of figures; infinite where they are not as
    many.
    """
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(one, other, strict=True))


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # tensorflow-cpu and its like
        return version(f"{name}-cpu")


if __name__ == "__main__":
    sys.exit(main())
