"""Predicted against measured step time on this host: every model under every baseline and the plan found, 1 and 2 devices.

    python benchmarks/prediction.py                               # about 15 minutes on two cores
    python benchmarks/prediction.py --models mlp cnn --devices 2 --rounds 9

One thread a device (NPROC=1). Three predictions of the same steps: by the rates and links of `partita machine measure`, by a
fit to operators none of which are of the model predicted, and by operators that were measured. Nothing is read from, or
left in, the figures that this user has measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace

WAYS = ("rates", "fitted", "measured")


def mlp():
    from keras import Input, Sequential, layers

    model = Sequential([Input((512,)), *(layers.Dense(1024, activation="relu") for _ in range(4)), layers.Dense(16)])
    return model, 256, "mse"


def cnn():
    from keras import Input, Sequential, layers

    blocks = [Input((32, 32, 3))]
    for width in (32, 64, 128):
        blocks += [layers.Conv2D(width, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D()]
    return Sequential([*blocks, layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(16, activation="softmax")]), 64, SPARSE


def alexnet():
    from keras import Input, Sequential, layers

    widths = (64, 5), (192, 3), (256, 3)
    convolutions = [x for w, k in widths for x in (layers.Conv2D(w, k, padding="same", activation="relu"), layers.MaxPooling2D())]
    dense = [layers.Flatten(), layers.Dense(2048, activation="relu"), layers.Dense(2048, activation="relu")]
    return Sequential([Input((48, 48, 3)), *convolutions, *dense, layers.Dense(16, activation="softmax")]), 32, SPARSE


def transformer():
    from keras import Input, Model, layers

    tokens = Input((64,), dtype="int32")
    x = layers.Embedding(2048, 256)(tokens)
    for _ in range(3):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(8, 32)(a, a, use_causal_mask=True)
        x = x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(layers.LayerNormalization()(x)))
    return Model(tokens, layers.Dense(2048, activation="softmax")(x)), 16, SPARSE


def resnet():
    from keras import applications

    return applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=16), 16, SPARSE


def recommender():
    from keras import Input, Model, layers

    users, items = Input((), dtype="int32"), Input((16,), dtype="int32")
    a = layers.Dense(256, activation="relu")(layers.Embedding(20000, 64)(users))
    b = layers.Dense(256, activation="relu")(layers.GlobalAveragePooling1D()(layers.Embedding(50000, 64)(items)))
    x = layers.Dense(512, activation="relu")(layers.Concatenate()([a, b]))
    return Model([users, items], layers.Dense(16, activation="softmax")(x)), 512, SPARSE


SPARSE = "sparse_categorical_crossentropy"
MODELS = {f.__name__: f for f in (mlp, cnn, alexnet, transformer, resnet, recommender)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.models, given.child, given.rounds)
        return 0
    rows = []
    for devices in given.devices:
        with tempfile.TemporaryDirectory() as cache:
            flags = f"--xla_force_host_platform_device_count={devices}"
            more = {"NPROC": "1", "XLA_FLAGS": flags, "KERAS_BACKEND": "jax", "PARTITA_CACHE": cache, "TF_CPP_MIN_LOG_LEVEL": "2"}
            command = [sys.executable, __file__, "--child", str(devices), "--rounds", str(given.rounds), "--models", *given.models]
            with subprocess.Popen(command, env=os.environ | more, stdout=subprocess.PIPE, text=True) as running:
                for line in running.stdout:
                    row = json.loads(line)
                    rows.append(row)
                    gaps = "  ".join(f"{w} {row[w] * 1e3:8.2f} ms ({row[w] / row['seconds'] - 1:+5.0%})" for w in WAYS)
                    print(f"{row['devices']} x {row['model']:12} {row['plan']:20} measured {row['seconds'] * 1e3:8.2f} ms  {gaps}", flush=True)
            if running.returncode:
                return running.returncode
    for way in WAYS:
        errors = [abs(r[way] / r["seconds"] - 1) for r in rows]
        cells = {(r["devices"], r["model"]) for r in rows}
        taus = [tau([r for r in rows if (r["devices"], r["model"]) == cell], way) for cell in cells]
        taus = [t for t in taus if t is not None]
        within = f"tau within a model: median {statistics.median(taus):.2f}, lowest {min(taus):.2f}; " if taus else ""
        every = tau(rows, way)
        print(
            f"{way:9} {len(rows)} steps: median error {statistics.median(errors):.1%}, worst {max(errors):.0%}; {within}"
            f"over all steps {every if every is None else round(every, 2)}"
        )
    return 0


def tau(rows: list[dict], way: str) -> float | None:
    """Kendall's tau of predicted and measured times; None for a single one."""
    from scipy.stats import kendalltau

    return float(kendalltau([r[way] for r in rows], [r["seconds"] for r in rows])[0]) if len(rows) > 1 else None


def distinct(plans: dict) -> dict:
    """The plans without those that are the same program as one before: data x tensor on two devices, ZeRO-2 beside ZeRO-1."""
    found: dict[str, tuple] = {}
    for name, plan in plans.items():
        stored = sorted((path, s.dim, s.axes, s.zero == 3) for path, s in plan.storage.items())
        found.setdefault(repr((plan.to_json()["operators"], stored)), (name, plan))
    return dict(found.values())


def child(models: list[str], devices: int, rounds: int) -> None:
    """Measures rates once, then per model: steps under every plan, and its operators."""
    from partita.api import capture, predicted, search
    from partita.execute import operators
    from partita.execute.calibrate import calibrate, file_of, key_of
    from partita.execute.devices import at_hand, detect
    from partita.execute.measure import step_seconds

    found = calibrate(at_hand(devices), lambda what: None)
    path = file_of(key_of(devices))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.to_toml(), encoding="utf-8")
    machine, done = detect(devices), []
    for name in models:
        model, batch, loss = MODELS[name]()
        model.compile("adam", loss)
        captured = capture(model, batch)
        result = search(captured, machine, measure=True)
        plans = distinct({n: p for n, (p, _) in result.baselines.items()} | {"found": result.plan})
        plans = plans if devices > 1 else {"one device": plans["one device"]}
        measured = operators.measured_operators(captured, machine, list(plans.values()))
        records = operators.load(operators.file_of_operators(machine), key_of(devices))
        done.append((name, captured, plans, measured, records, step_seconds(captured, plans, rounds)))
    for n, (name, captured, plans, measured, records, seconds) in enumerate(done):
        mine = records.keys() - (done[n - 1][4].keys() if n else set())
        others = [r for text, r in done[-1][4].items() if text not in mine]
        scale, error = operators.fitted([r["features"] for r in others], [r["seconds"] for r in others])
        fit = replace(machine, times=replace(measured.times, seconds={}, own={}, scale=scale, error=error, samples=len(others)))
        for plan_name, plan in plans.items():
            ways = {w: predicted(captured.graph, m, plan).seconds for w, m in zip(WAYS, (machine, fit, measured), strict=True)}
            print(json.dumps({"devices": devices, "model": name, "plan": plan_name, "seconds": seconds[plan_name], **ways}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
