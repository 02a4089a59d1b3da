"""Several processes that train together: the figures of one, files written once, and whatever
goes wrong in one said in a sentence.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partita.cli.processes import _seed
from partita.errors import PartitaError
from partita.execute import members, processes
from partita.execute.process_group import group

SCRIPT = """
    import os, signal, sys, keras, numpy as np
    from keras import layers

    me = int(os.environ.get("JAX_PROCESS_ID", 0))

    class Fault(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            {fault}

    x = np.random.default_rng({seed}).normal(size=(200, 128)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    model = keras.Sequential([layers.Dense(512, activation="relu"), layers.Dropout(0.2), layers.Dense(256, activation="relu"), layers.Dense(2)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    saved = [keras.callbacks.ModelCheckpoint("best.keras"), keras.callbacks.CSVLogger("log.csv")]
    history = model.fit(x, y, batch_size=48, epochs=2, validation_split=0.1, verbose=0, callbacks=[*saved, Fault()]).history
    loss = model.evaluate(x, y, verbose=0)[0]
    print("figures", *(repr(float(v)) for v in (*history["loss"], *history["val_loss"], loss, model.predict(x[:7], verbose=0).sum())))
    print("weights", repr(float(sum(np.abs(w).sum() for w in model.get_weights()))))
    absolute = [keras.ops.convert_to_numpy(keras.ops.abs(w)) for w in model.weights]
    print("absolute", repr(float(sum(w.sum() for w in absolute))))
    again = keras.models.load_model("best.keras")
    print("restored", repr(float(sum(np.abs(w).sum() for w in again.get_weights()))))
"""


UNTRAINED = """
    import os

    me = int(os.environ["JAX_PROCESS_ID"])
    {fault}
"""


def start(
    folder: Path,
    processes: int,
    fault: str = "pass",
    seed: str = "0",
    more: Sequence[str] = (),
    script: str = SCRIPT,
    **said: str,
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(textwrap.dedent(script).format(fault=fault, seed=seed))
    environment = {
        k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")
    } | {"PARTITA_SEED": "5", **said}
    together = (
        ["--processes", str(processes), "--devices", str(processes)] if processes else ["--quiet"]
    )
    command = [sys.executable, "-m", "partita", "run", "train.py", *together, *more]
    listening = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs are born deaf to it
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, cwd=folder, env=environment, preexec_fn=listening)


def figures(out: str, what: str) -> list[float]:
    (line,) = re.findall(rf"^{what} (.*)$", out, re.M)  # one process prints
    return [float(x) for x in line.split()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    code = "import keras; keras.utils.set_random_seed(5)\n" + textwrap.dedent(SCRIPT).format(
        fault="pass", seed="0"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    ).stdout


@pytest.mark.parametrize(("processes", "plan"), [(2, ["--plan", "fsdp"]), (4, [])])
def test_processes_compute_what_one_computes_and_write_once(
    processes: int, plan: list[str], plain: str, tmp_path: Path
) -> None:
    job = start(tmp_path, processes, more=plan)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    assert plan or (f"host:{processes}" in err and "predicted" in err)
    for what in ("figures", "weights", "absolute", "restored"):
        np.testing.assert_allclose(figures(out, what), figures(plain, what), rtol=2e-4)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert len(lines) == 3, "a header and two epochs, written by one process"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.keras", "log.csv", "train.py"]


def test_processes_time_operators_together_and_the_thread_of_their_links_lets_compute_first(
    tmp_path: Path,
) -> None:
    fault = "if epoch == 0 and hasattr(os, 'SCHED_BATCH'): print('batch', [os.sched_getscheduler(int(t)) for t in os.listdir('/proc/self/task')].count(os.SCHED_BATCH))"
    job = start(
        tmp_path, 2, fault, more=["--measure-operators"], PARTITA_CACHE=str(tmp_path / "cache")
    )
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    assert re.search(
        r"of the compute, \d+% measured operator by operator", " ".join(err.split())
    ), err
    assert re.search(r"(\d+) of \1 operators timed", err)
    assert [p.name.startswith("operators-") for p in (tmp_path / "cache").iterdir()] == [True], (
        "one process keeps the times"
    )
    assert ("batch 1" in out) == hasattr(os, "SCHED_BATCH"), "gloo's thread, and no other"


def test_the_death_of_one_process_ends_all_and_names_it(tmp_path: Path) -> None:
    fault = "if me == 1 and epoch == 1: os.kill(os.getpid(), signal.SIGKILL)"
    job = start(tmp_path, 2, fault, more=["--manage=watch"])
    _, err = job.communicate(timeout=100)
    assert job.returncode == 128 + 9
    assert err.strip().endswith(
        "partita: process 1 of 2 was killed (SIGKILL); the others were stopped.\n"
        "partita: with --manage, the other processes would go on from a snapshot in their memory."
    )
    assert "Traceback" not in err and "Gloo AllGather" not in err
    assert (tmp_path / "best.keras").stat().st_size > 100_000, "what the first epoch saved is whole"


def test_an_error_in_one_process_is_shown_and_named(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "if me == 1: raise ValueError('only here')")
    _, err = job.communicate(timeout=100)
    assert job.returncode == 1
    assert "[process 1] ValueError: only here" in err
    assert "process 1 of 2 stopped with code 1" in err


def test_a_failure_of_one_process_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "alone", lambda: False)
    monkeypatch.setattr(processes, "exchanged", lambda name, reason: [reason, "no memory"])
    monkeypatch.setattr(members, "generation", lambda: 0)
    monkeypatch.setattr(members, "alive", lambda: (0, 1))
    assert processes.agreed_failure("steps", "") == "Process 1: no memory"
    assert processes.agreed_failure("steps", "no code") == "no code"


def test_different_data_is_found_before_the_first_step(tmp_path: Path) -> None:
    job = start(tmp_path, 2, seed="me")
    _, err = job.communicate(timeout=100)
    assert job.returncode == 2
    assert "Weights and batch of the first step differ between process 0 and process 1. " in err


def start_alone(folder: Path, port: int, index: str = "0") -> subprocess.Popen[str]:
    """A process of two that is started by hand."""
    said = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": index,
        "PARTITA_TIMEOUT": "4",
    }
    return start(folder, 0, **said)


def listening(port: int) -> set[str]:
    """Addresses at which somebody listens to a port, as the kernel writes them."""
    rows = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    local = [line.split()[1] for line in rows.splitlines() if line.split()[3] == "0A"]
    return {
        address
        for address, _, number in (row.partition(":") for row in local)
        if int(number, 16) == port
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("index", "missing"),
    [("0", "one of the others has not started"), ("1", "process 0 does not answer")],
)
def test_who_waits_in_vain_says_for_what_and_until_when(
    index: str, missing: str, tmp_path: Path
) -> None:
    port = free_port()
    job = start_alone(tmp_path, port, index)
    addresses: set[str] = set()
    while job.poll() is None:
        addresses |= listening(port)
        time.sleep(0.1)
    err = job.communicate()[1]
    assert job.returncode == 3
    # The coordinator listens at 127.0.0.1, in IPv4 or mapped to IPv6, and nowhere else.
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert addresses <= loopback and bool(addresses) == (index == "0")
    assert missing in err and "has waited 4 s" in err


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        job = start_alone(tmp_path, taken.getsockname()[1])
        err = job.communicate(timeout=100)[1]
    assert job.returncode == 2
    assert "is in use. Give another one" in err


def test_devices_that_cannot_be_shared_out_are_said(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "partita",
        "run",
        "--processes",
        "2",
        "--devices",
        "3",
        "train.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "3 devices cannot be divided among 2 processes" in done.stderr.replace("\n", " ")


OPEN_MPI = {  # what mpirun of Open MPI 4.1 gives to process 1 of 2, inside a Slurm allocation
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "PMIX_NAMESPACE": "308805633",
    "OMPI_MCA_orte_hnp_uri": "308805632.0;tcp://192.0.2.2,10.0.0.9:48009;tcp6://[fd00::2]:38673",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "3",
}
SLURM = {  # what srun of Slurm 22.05 gives to task 3 of 5, the first of the second node
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "5",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("said", "count", "index", "host", "here", "local"),
    [
        (BY_HAND, 2, 1, "10.0.0.1", 1, 0),
        (OPEN_MPI, 2, 1, "192.0.2.2", 1, 0),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            2,
            1,
            "127.0.0.1",
            2,
            1,
        ),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fd00::2]:38673"},
            2,
            1,
            "[fd00::2]",
            1,
            0,
        ),
        (SLURM, 5, 3, "node007", 2, 0),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "a1,b[2-3]", "SLURM_STEP_TASKS_PER_NODE": "1(x5)"},
            5,
            3,
            "a1",
            1,
            0,
        ),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[2,4]-ib", "SLURM_NODEID": "0"}, 5, 3, "n2-ib", 3, 0),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}, 5, 3, "127.0.0.1", 5, 0),
        ({**SLURM, **MPICH}, 2, 1, "127.0.0.1", 2, 1),
        ({**SLURM, **BY_HAND}, 2, 1, "10.0.0.1", 1, 0),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "head:1234"}, 5, 3, "head", 2, 0),
        ({**MPICH, "JAX_COORDINATOR_ADDRESS": "head:1234"}, 2, 1, "head", 2, 1),
    ],
)
def test_what_a_launcher_says_is_read(
    said: dict[str, str], count: int, index: int, host: str, here: int, local: int
) -> None:
    found = group(said)
    assert found is not None
    assert (
        found.count,
        found.index,
        found.address.rpartition(":")[0],
        found.local_count,
        found.local_index,
    ) == (count, index, host, here, local)
    assert found.address.endswith(":1234") or 61440 <= int(found.address.rpartition(":")[2]) < 65536


def test_processes_of_one_job_find_one_port_and_another_job_another() -> None:
    port = lambda said: found.address if (found := group(said)) else ""
    assert (
        port(SLURM)
        == port({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
        != port({**SLURM, "SLURM_STEP_ID": "1"})
    )
    assert port({**SLURM, "JAX_COORDINATOR_PORT": "4321"}) == "node007:4321"


@pytest.mark.parametrize(
    "said",
    [
        {},
        {
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "3",
            "SLURM_JOB_NODELIST": "vm",
        },  # a batch script
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**BY_HAND, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_process_that_is_alone_waits_for_nobody(said: dict[str, str]) -> None:
    assert group(said) is None


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (
            MPICH,
            "MPICH started 2 processes without an address for process 0. Give all of them its host and a free port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "head:1234"},
            "is set to 'head:1234', and JAX_NUM_PROCESSES and JAX_PROCESS_ID are not. Set all three",
        ),
        (
            {**BY_HAND, "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is 2, and there are 2 processes: number them 0 to 1.",
        ),
        (
            {**BY_HAND, "JAX_COORDINATOR_ADDRESS": "head"},
            "write the host of process 0 and a port from 1 to 65535, as in '10.0.0.1:1234'",
        ),
        ({**BY_HAND, "JAX_COORDINATOR_ADDRESS": "head:70000"}, "and a port from 1 to 65535"),
        (
            {**BY_HAND, "JAX_COORDINATOR_ADDRESS": ""},
            "JAX_NUM_PROCESSES is set to '2', and JAX_COORDINATOR_ADDRESS is not. Set all three",
        ),
        (
            {**BY_HAND, "JAX_NUM_PROCESSES": "0"},
            "JAX_NUM_PROCESSES is 0: write the number of processes, at least 1.",
        ),
        ({**BY_HAND, "JAX_NUM_PROCESSES": "²"}, "JAX_NUM_PROCESSES is '²': write a whole number."),
        ({**SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x': write a whole number."),
    ],
)
def test_what_a_launcher_does_not_say_is_asked_for(said: dict[str, str], error: str) -> None:
    with pytest.raises(PartitaError, match=re.escape(error)):
        group(said)


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_processes_do_not_outlive_the_one_that_started_them(
    sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    fault = "open(f'{me}.pid', 'w').write(str(os.getpid())); __import__('time').sleep(60)"
    script = SCRIPT if sent == signal.SIGTERM else UNTRAINED
    job = start(tmp_path, 2, fault, script=script)
    until = time.monotonic() + 100
    while not all(
        (tmp_path / f"{i}.pid").exists() and (tmp_path / f"{i}.pid").read_text() for i in range(2)
    ):
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.1)
    job.send_signal(sent)
    _, err = job.communicate(timeout=30)
    assert job.returncode == code
    assert "Traceback" not in err
    if sent == signal.SIGTERM:
        assert err.strip().endswith(
            "partita: a signal asked to stop; the 2 processes were stopped."
        )
    for i in range(2):
        pid = int((tmp_path / f"{i}.pid").read_text())
        while (
            Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        ):
            assert time.monotonic() < until
            time.sleep(0.1)


UNWRITABLE = """
    import os, keras, numpy as np
    from keras import layers

    model = keras.Sequential([layers.Dense(64), layers.Dense(3)])
    model.compile("sgd", "mse")
    x = np.ones((8, 64), "float32")
    model.fit(x, x[:, :3], verbose=0)
    model.save("model.keras")
    before = os.path.getsize("model.keras")
    for name in ("nowhere/model.keras", "nowhere/model.weights.h5"):
        try:
            (model.save if name.endswith("keras") else model.save_weights)(name)
        except OSError as error:
            print("said", error.strerror)
    model.fit(x, x[:, :3], verbose=0)
    print("trained on", os.path.getsize("model.keras") == before, sorted(os.listdir()))
"""


def test_a_save_that_one_process_cannot_write_fails_in_all_and_training_goes_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(UNWRITABLE))
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    command = [sys.executable, "-m", "partita", "run", "--quiet", "--processes", "2", "train.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("said No such file or directory") == 2
    assert "trained on True ['model.keras', 'train.py']" in done.stdout


CHECKPOINTED = """
    import os, sys, keras, numpy as np, partita
    from keras import layers

    keras.utils.set_random_seed(3)
    x = np.random.default_rng(0).normal(size=(192, 128)).astype("float32")
    model = keras.Sequential([layers.Dense(int(os.environ.get("WIDTH", "512")), activation="relu"), layers.Dense(256, activation="relu"), layers.Dense(2)])
    model.compile("adam", "mse")
    kept = partita.Checkpoint("kept")
    losses = model.fit(x, x[:, :2], batch_size=48, epochs=int(sys.argv[1]), shuffle=False, verbose=0, callbacks=[kept]).history["loss"]
    print("losses", *map(repr, losses))
"""


def checkpointed(
    folder: Path, epochs: int, *how: str, **more: str
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(textwrap.dedent(CHECKPOINTED))
    environment = {
        k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")
    } | more
    command = [sys.executable, "-m", "partita", "run", *how, "train.py", str(epochs)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=200
    )


def test_a_checkpoint_resumes_under_another_plan_and_number_of_processes(tmp_path: Path) -> None:
    straight = checkpointed(tmp_path / "straight", 4, "--devices", "1")
    first = checkpointed(tmp_path / "resumed", 2, "--devices", "3")
    second = checkpointed(tmp_path / "resumed", 4, "--processes", "2")
    resumed = [loss for done in (first, second) for loss in figures(done.stdout, "losses")]
    assert len(resumed) == 4, first.stderr + second.stderr
    np.testing.assert_allclose(resumed, figures(straight.stdout, "losses"), rtol=1e-4)
    other = checkpointed(tmp_path / "resumed", 5, "--devices", "1", WIDTH="300")
    assert other.returncode == 2
    assert (
        "are of another model: '00000 sequential/dense/kernel' is float32[128, 512] there"
        in other.stderr
    )
    assert "Traceback" not in other.stderr


RESTARTED = """
    import os, signal, sys, keras, numpy as np
    from pathlib import Path

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2 and not Path("died").exists():
                Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    x = np.random.default_rng(0).normal(size=(48, 8)).astype("float32")
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("adam", "mse")
    history = model.fit(x, x[:, :2], batch_size=16, epochs=4, verbose=0, callbacks=[Die()])
    print("epochs", *history.epoch, "falls", history.history["loss"] == sorted(history.history["loss"], reverse=True))
"""


def test_a_run_of_one_process_is_started_again_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(RESTARTED))
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    done = subprocess.run(
        [sys.executable, "-m", "partita", "run", "--devices=1", "--restarts", "1", "train.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"TMPDIR": str(tmp_path)},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "epochs 0 1 2 3 falls True" in done.stdout
    for sentence in (
        "partita: the process was killed (SIGKILL).",
        "partita: starting again (restart 1 of 1)",
        "partita: 'sequential' goes on after epoch 1",
    ):
        assert sentence in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["died", "train.py"]


RETURNING = """
    import os, signal, sys, time, keras, numpy as np
    from pathlib import Path
    from partita.execute import members

    me = os.environ["JAX_PROCESS_ID"]

    class LoseAndReturn(keras.callbacks.Callback):
        batches = 0

        def on_train_batch_end(self, batch, logs=None):
            self.batches += 1
            if self.batches == 3 and me == "1" and not Path("died").exists():
                Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while self.batches == 6 and me == "0" and not members.returned():
                time.sleep(0.01)

    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    start = keras.initializers.Zeros()
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, use_bias=False, kernel_initializer=start)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    callback = LoseAndReturn()
    history = model.fit(x, x[:, :2], batch_size=16, epochs=10, shuffle=False, verbose=0, callbacks=[callback])
    Path("losses-" + me).write_text(" ".join(map(repr, [callback.batches, *history.history["loss"]])))
"""


def mean_losses(epochs: int) -> list[float]:
    """The losses of RETURNING, by hand."""
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    weights = np.zeros((8, 2))
    losses = []
    for _ in range(epochs):
        epoch = []
        for part in (x[:16], x[16:]):
            error = part @ weights - part[:, :2]
            epoch.append(float(np.mean(error**2)))
            weights -= 0.1 * part.T @ error / 16
        losses.append(float(np.mean(epoch)))
    return losses


def test_a_lost_process_comes_back_into_the_training(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(RETURNING))
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    command = [sys.executable, "-m", "partita", "run", "--processes=2", "--devices=2", "--plan=dp"]
    done = subprocess.run(
        [*command, "--manage", "--restarts", "1", "train.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 was killed (SIGKILL); process 0 goes on after" in done.stderr
    assert "process 1 is back; processes 0 and 1 go on after" in done.stderr
    for number in range(2):
        batches, *losses = map(float, (tmp_path / f"losses-{number}").read_text().split())
        assert batches == 20
        np.testing.assert_allclose(losses, mean_losses(10), rtol=1e-5)


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    import partita

    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    x = np.ones((8, 4), "float32")
    kept = partita.Checkpoint(tmp_path / "kept")
    model.fit(x, x[:, :3], verbose=0, callbacks=[kept])
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(kept._manager, "save", lambda *a, **k: (_ for _ in ()).throw(full))
    with pytest.raises(
        PartitaError,
        match="epoch 2 cannot be written .*: No space left on device. The last complete one is of epoch 1; the model",
    ):
        model.fit(x, x[:, :3], verbose=0, epochs=2, callbacks=[kept])
    assert all(np.isfinite(w).all() for w in model.get_weights())
    (tmp_path / "kept" / "0" / "model" / "metadata").write_text("{")
    with pytest.raises(
        PartitaError,
        match="The checkpoint of epoch 1 in .* cannot be read: .* Delete the folder .*0' to resume from the one before",
    ):
        model.fit(x, x[:, :3], verbose=0, callbacks=[partita.Checkpoint(tmp_path / "kept")])
    with pytest.raises(PartitaError, match="cannot be saved in"):
        (tmp_path / "file").write_text("")
        partita.Checkpoint(tmp_path / "file")


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", "", str(2**32)])
def test_a_seed_that_is_none_is_said(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_SEED", seed)
    with pytest.raises(PartitaError, match=f"PARTITA_SEED is '{seed}': write a whole number"):
        _seed()
