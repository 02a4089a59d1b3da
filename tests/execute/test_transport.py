"""Device groups on two processes: equal figures, and a sentence for whatever a peer does not do."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from partita.cli.launch import _free_address
from partita.errors import LostProcessError
from partita.execute import processes
from partita.plans.plan import Mesh, Plan

TRAIN = """
    import os, sys, keras, numpy as np, partita
    from keras import layers

    keras.utils.set_random_seed(5)
    x = np.random.default_rng(0).normal(size=(40, 16)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    inputs = keras.Input((16,))
    hidden = layers.Dense(16, activation="relu", name="first")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="last")(hidden), name="two")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.5), loss, metrics=["accuracy"])
    epochs = int(sys.argv[1])
    options = dict(batch_size=16, validation_split=0.2, verbose=0, shuffle=False)
    saved = partita.Checkpoint("saved")
    history = model.fit(x, y, epochs=epochs, callbacks=[saved], **options).history
    figures = [v for name in ("loss", "accuracy", "val_loss") for v in history[name]]
    figures += [*model.evaluate(x, y, verbose=0), model.predict(x[:7], verbose=0).sum()]
    model.save("model.keras")
    figures += [np.abs(w).sum() for w in keras.models.load_model("model.keras").get_weights()]
    print("figures", *(repr(float(v)) for v in figures))
"""


def environment(**more: str) -> dict[str, str]:
    absent = ("JAX_NUM_CPU_DEVICES", "NPROC")
    return {key: v for key, v in os.environ.items() if key not in absent} | more


def train(folder: Path, epochs: int, *options: str) -> list[float]:
    (folder / "train.py").write_text(textwrap.dedent(TRAIN))
    choices = {"first": {"a": "at(0)"}, "last": {"a": "at(1)"}}
    plan = Plan("two", "host:2", Mesh.of((2,)), choices, batch_size=16, microbatches=4)
    plan.save(folder / "pipeline.json")
    command = [sys.executable, "-m", "partita", "run", "train.py", *options, str(epochs)]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert ("one step as planned and on one device" in text) == ("--verify" in options)
    return figures(done.stdout)


def here(
    epochs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[float]:
    """The figures of the script in this process, on one device."""
    monkeypatch.setattr(sys, "argv", ["train.py", str(epochs)])
    exec(textwrap.dedent(TRAIN), {})
    return figures(capsys.readouterr().out)


def figures(text: str) -> list[float]:
    (line,) = re.findall("^figures (.*)$", text, re.M)
    return [float(word) for word in line.split()]


def test_a_pipeline_over_two_processes_resumes_on_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    two = train(tmp_path, 1, "--plan", "pipeline.json", "--processes", "2", "--verify")
    monkeypatch.chdir(tmp_path)
    resumed = here(2, monkeypatch, capsys)
    monkeypatch.chdir(tmp_path / "whole")
    one = here(2, monkeypatch, capsys)
    first_epoch = [two[0], two[1], two[2]]
    np.testing.assert_allclose(first_epoch, [one[0], one[2], one[4]], rtol=1e-5)
    of_second_epoch = [one[1], one[3], one[5], *one[6:]]
    np.testing.assert_allclose(resumed, of_second_epoch, rtol=1e-5)


@pytest.mark.parametrize("call", ["recv", "send"])
def test_a_broken_connection_means_a_lost_process(call: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "alone", lambda: False)
    with (
        pytest.raises(LostProcessError, match="in the middle of a step"),
        processes.together("a step"),
    ):
        raise jax.errors.JaxRuntimeError(
            f"INTERNAL: -1 = {call}() failed errno: 107 err: Transport endpoint is not connected"
        )


PEER = """
    import os, sys, time, jax
    from jax.sharding import SingleDeviceSharding
    from partita.errors import ProcessError
    from partita.execute import joining, process_arrays
    from partita.execute.joining import join
    from partita.execute.process_group import group
    from partita.execute.processes import together

    process_arrays.WAIT_SECONDS = 2 if sys.argv[1] == "silent" else 60
    joining.HEARTBEAT = 12
    join(group(), print)
    channel = process_arrays.channel()
    array = jax.numpy.arange(3.0)
    if jax.process_index() == 1:
        channel.offer(7, [array], copies=False)
        time.sleep(30 if sys.argv[1] == "silent" else 2)
        os._exit(0)
    here = SingleDeviceSharding(jax.local_devices()[0])
    shape = jax.ShapeDtypeStruct((3,), "float32", sharding=here)
    print("received", channel.ask(1, 7, [shape], "the first value")[0].tolist(), flush=True)
    (missing,) = channel.ask(1, 8, [shape], "dense/kernel of microbatch 3")
    try:
        with together("a step"):
            jax.block_until_ready(missing)
    except ProcessError as error:
        print(error, flush=True)
        os._exit(75)
"""


@pytest.mark.parametrize(
    ("peer", "code", "message"),
    [
        (
            "silent",
            3,
            "process 0 of 2 has waited 2 s for dense/kernel of microbatch 3 of process 1, which "
            "does not send it. Run the same script with the same batches in all processes, and "
            "look at the output of process 1.",
        ),
        ("dead", 75, "ended in the middle of a step, so the others stop."),
    ],
)
def test_a_peer_that_does_not_send_is_named(peer: str, code: int, message: str) -> None:
    pipe = subprocess.PIPE
    address = _free_address()
    jobs = []
    for number in range(2):
        variables = environment(
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
            JAX_PLATFORMS="cpu",
        )
        command = [sys.executable, "-c", textwrap.dedent(PEER), peer]
        jobs.append(subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True))
    out, err = jobs[0].communicate(timeout=100)
    jobs[1].kill()
    jobs[1].communicate()
    assert "received [0.0, 1.0, 2.0]" in out, err
    assert message in out + err
    assert jobs[0].returncode == code
