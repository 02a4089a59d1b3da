"""Several processes that train on one graph: the numbers of one device, and the death of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np

import partita.gnn as gnn
from partita.gnn.nn import models

HOW = ["--model", "sage", "--hidden", "8", "--decay", "0", "--seed", "3"]


def graph_in(folder: Path) -> gnn.Graph:
    """A drawn graph of 300 vertices, also written to g.npz; one mask, so one evaluation."""
    random = np.random.default_rng(0)
    graph = gnn.Graph.from_edges(
        *random.integers(0, 290, (2, 2000)),
        300,
        features=random.standard_normal((300, 12)),
        labels=random.integers(0, 4, 300),
        train=random.permutation(300)[:200],
    )
    gnn.save(graph, folder / "g.npz")
    return graph


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "partita",
        "gnn",
        "train",
        str(folder / "g.npz"),
        *HOW,
        "--processes",
        "2",
        *more,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def alone(graph: gnn.Graph, epochs: int) -> models.SAGE:
    """The model after so many epochs in this process, on one device."""
    keras.utils.set_random_seed(3)
    model = models.SAGE(hidden=8, classes=4, dropout=0.5)
    model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    model.fit(graph, epochs, verbose=0)
    return model


def workers(pid: int) -> list[int]:
    return sorted(
        int(c)
        for task in Path(f"/proc/{pid}/task").glob("*")
        for c in (task / "children").read_text().split()
    )


def test_a_killed_worker_is_named_and_the_checkpoint_goes_on_to_the_same_loss(
    tmp_path: Path,
) -> None:
    graph = graph_in(tmp_path)
    saved = tmp_path / "saved"
    job = start(tmp_path, "--epochs", "100000", "--checkpoint", str(saved))
    until = time.monotonic() + 100
    while not (saved / "3").exists():
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 128 + 9 and "Traceback" not in err
    assert err.strip().endswith(
        "partita: process 1 of 2 was killed (SIGKILL); the others were stopped."
    )

    saved_epoch = max(int(p.name) for p in saved.iterdir() if p.name.isdigit())
    epochs = saved_epoch + 4
    again = start(
        tmp_path,
        "--epochs",
        str(epochs),
        "--checkpoint",
        str(saved),
        "--columns",
        "2",
        "--save",
        str(tmp_path / "m.keras"),
        "--json",
    )
    text, err = again.communicate(timeout=100)
    assert again.returncode == 0, err
    facts = json.loads(text)
    model = alone(graph, epochs)
    assert facts["epochs"] == epochs - saved_epoch - 1 and len(facts["parts"]) == 2
    logs = model.evaluate(graph, "train", return_dict=True)
    np.testing.assert_allclose(facts["accuracy"]["train"], logs["accuracy"], atol=0.021)
    np.testing.assert_allclose(facts["loss"], logs["loss"], rtol=1e-3)
    np.testing.assert_allclose(
        keras.saving.load_model(tmp_path / "m.keras").predict(graph),
        model.predict(graph),
        rtol=1e-2,
        atol=1e-3,
    )
