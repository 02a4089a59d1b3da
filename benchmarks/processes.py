"""The found plan against what an expert would write and against `keras.distribution`, on two processes of one core each, three links.

    sudo python benchmarks/processes.py                     # all models, full speed, 1 Gbit/s and 200 Mbit/s
    python benchmarks/processes.py --links full --models lstm

Each link is a network namespace whose loopback `tc tbf` shapes (this needs root and iproute2). In it the machine is measured
first, as `partita machine measure` does, then operators; then every plan is compiled and the plans take turns. Medians. The processes of
`keras.distribution` are of their own, without Partita.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINKS = {"full": "", "1gbit": "1gbit", "200mbit": "200mbit"}
PLANS = ("data parallel", "one weird trick", "tensor parallel", "data x tensor", "ZeRO-3", "one device")
KERAS = "keras.distribution"
FOUND, BY_RATES = "found", "found by rates"
"""The plan for operators that were timed (`--measure-operators`), and the one for a machine that was only measured (`partita machine measure`)."""
ROUNDS = {"full": 15, "1gbit": 3, "200mbit": 2}
MODELS = ("alexnet", "transformer", "recommender", "lstm")


def model_of(name: str):  # noqa: ANN201
    import keras
    from keras import layers

    if name == "alexnet":
        convs = [
            layers.Conv2D(64, 11, 4, padding="same", activation="relu"), layers.MaxPooling2D(3, 2),
            layers.Conv2D(192, 5, padding="same", activation="relu"), layers.MaxPooling2D(3, 2),
            layers.Conv2D(384, 3, padding="same", activation="relu"), layers.Conv2D(256, 3, padding="same", activation="relu"),
            layers.Conv2D(256, 3, padding="same", activation="relu"), layers.MaxPooling2D(3, 2),
        ]  # fmt: skip
        dense = [layers.Flatten(), layers.Dense(4096, activation="relu"), layers.Dense(4096, activation="relu"), layers.Dense(1000)]
        model = keras.Sequential([keras.Input((224, 224, 3)), *convs, *dense], name=name)
        batch = 32
    elif name == "transformer":
        words = keras.Input((64,), dtype="int32")
        x = layers.Embedding(8192, 256)(words)
        for _ in range(2):
            y = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(4, 64)(y, y, use_causal_mask=True)
            y = layers.LayerNormalization()(x)
            x = x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(y))
        model, batch = keras.Model(words, layers.Dense(8192)(x), name=name), 16
    elif name == "recommender":
        inputs = [keras.Input((), dtype="int32", name=f"column{i}") for i in range(8)]
        x = layers.Concatenate()([layers.Embedding(50_000, 32)(i) for i in inputs])
        for width in (1024, 512, 256):
            x = layers.Dense(width, activation="relu")(x)
        model, batch = keras.Model(inputs, layers.Dense(2)(x), name=name), 512
    else:
        words = keras.Input((32,), dtype="int32")
        x = layers.Embedding(8192, 256)(words)
        x = layers.LSTM(512)(layers.LSTM(512, return_sequences=True)(x))
        model, batch = keras.Model(words, layers.Dense(8192)(x), name=name), 64
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, batch


def peer(models: list[str], rounds: int) -> None:
    """Median seconds of a step under `keras.distribution.DataParallel`, each process reading its own half of the batch: nothing of Partita."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax

    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]),
        cluster_detection_method="deactivate",
    )  # fmt: skip
    import keras
    import numpy as np

    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices(), auto_shard_dataset=False))
    for name in models:
        keras.utils.set_random_seed(0)  # Keras wants the same first weights in all processes
        model, batch = model_of(name)
        inputs = [np.zeros((batch // 2, *i.shape[1:]), i.dtype) for i in model.inputs]
        labels = np.zeros((batch // 2, *model.output_shape[1:-1]), "int32")
        times = []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            model.train_on_batch(inputs[0] if len(inputs) == 1 else inputs, labels)
            times.append(time.perf_counter() - begun)
        if jax.process_index() == 0:
            print("RESULT " + json.dumps({"model": name, "seconds": statistics.median(times[1:])}), flush=True)


def child(models: list[str], rounds: int) -> None:
    os.environ["KERAS_BACKEND"] = "jax"
    from partita.execute.devices import at_hand, keep_freed_memory, request_cpu_devices
    from partita.execute.processes import from_first, group, is_first, join

    keep_freed_memory()  # before JAX starts, as `partita run` does
    request_cpu_devices(1)
    who = group()
    assert who is not None
    join(who, lambda text: None)
    from partita.api import capture, timed_search
    from partita.execute.calibrate import calibrate
    from partita.execute.measure import step_seconds
    from partita.plan.plan import Plan
    from partita.search.find import find

    found = calibrate(at_hand(), lambda what: None)
    machine = at_hand().revised(json.loads(from_first("machine", lambda: json.dumps(found.values))), "measured")
    for name in models:
        model, batch = model_of(name)
        captured = capture(model, batch)
        timed = timed_search(captured, machine, None, None, None)

        def plans_of(captured: Any = captured, timed: Any = timed) -> str:
            by_rates = find(captured.graph, machine)
            known = {n: timed.baselines[n] for n in PLANS if n in timed.baselines}
            known |= {BY_RATES: (by_rates.plan, by_rates.prediction), FOUND: (timed.plan, timed.prediction)}
            for n in (BY_RATES, FOUND):
                if known[n][0].devices == 1:  # what it comes down to: both processes do all of it
                    known[n] = (known["one device"][0], known[n][1])
            return json.dumps({n: (plan.to_json(), prediction.seconds) for n, (plan, prediction) in known.items()})

        said = json.loads(from_first("plans to run", plans_of))
        times = step_seconds(captured, {n: Plan.from_json(plan) for n, (plan, _) in said.items()}, rounds)
        if is_first():
            rows = {n: {"predicted": seconds, "measured": times[n]} for n, (_, seconds) in said.items()}
            print("RESULT " + json.dumps({"model": name, "plan": said[FOUND][0]["operators"], "rows": rows}), flush=True)


@contextmanager
def namespace(rate: str) -> Iterator[list[str]]:
    """A network namespace with a loopback of this rate, as the start of a command; none for full speed."""
    if not rate:
        yield []
        return
    name = f"slow{os.getpid()}"
    run = lambda *words: subprocess.run(words, check=True)
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
        yield ["ip", "netns", "exec", name]
    finally:
        run("ip", "netns", "del", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, after one to warm up")
    parser.add_argument("--part", choices=("partita", "peer"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        {"partita": child, "peer": peer}[given.part](given.models, given.rounds)
        return 0
    for link in given.links:
        with namespace(LINKS[link]) as start:
            rounds = given.rounds or ROUNDS[link]
            peers = {r["model"]: r["seconds"] for r in results(start, "peer", given.models, rounds)}
            for result in results(start, "partita", given.models, rounds):
                show(link, result, peers[result["model"]])
    return 0


def results(start: list[str], part: str, models: list[str], rounds: int) -> Iterator[dict]:
    """What two processes of one core each find, model by model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+") as errors:
        running = []
        for i in range(2):
            said = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i), "NPROC": "1"}
            command = [*start, "taskset", "-c", str(i), sys.executable, __file__, "--part", part, "--rounds", str(rounds), "--models", *models]
            out = subprocess.PIPE if i == 0 else subprocess.DEVNULL
            running.append(subprocess.Popen(command, env={**os.environ, **said}, stdout=out, stderr=errors, text=True))
        assert running[0].stdout is not None
        for line in running[0].stdout:
            if line.startswith("RESULT "):
                yield json.loads(line[7:])
        if any(p.wait() for p in running):
            errors.seek(0)
            raise SystemExit(errors.read()[-3000:])


def show(link: str, result: dict, peer: float) -> None:
    rows = result["rows"] | {KERAS: {"predicted": result["rows"]["data parallel"]["predicted"], "measured": peer}}
    times = {n: r["measured"] for n, r in rows.items()}
    print(f"{result['model']} over {link}:", flush=True)
    for n, r in sorted(rows.items(), key=lambda x: x[1]["measured"]):
        print(f"  {n:18s} predicted {r['predicted']:8.3f} s  measured {r['measured']:8.3f} s")
    best = min((t, n) for n, t in times.items() if n not in (FOUND, BY_RATES, KERAS))
    gains = "; ".join(f"{n} / found {times[n] / times[FOUND]:.2f}" for n in (KERAS, "data parallel"))
    print(f"  {gains}; found / best baseline ({best[1]}) {times[FOUND] / best[0]:.3f}, by rates {times[BY_RATES] / best[0]:.3f}")
    print(f"  {result['plan']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
