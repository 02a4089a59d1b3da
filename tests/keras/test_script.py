"""An unmodified script runs as under Python itself, its training planned; whatever goes wrong in
it stays its own.
"""

import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

import keras
import pytest

from partita.errors import CaptureError, PartitaError
from partita.execute.devices import accelerator, detect, request_cpu_devices
from partita.keras.script import NOTHING_PARALLEL, Script, plan_script, run_script
from partita.plans.baselines import BASELINES
from partita.plans.plan import mesh_for

TRAIN = """
    import argparse, sys, keras, numpy as np, beside
    from keras import layers

    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    epochs = parser.parse_args().epochs

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            {callback}

    if __name__ == "__main__":
        assert sys.modules["__main__"].epochs == epochs
        keras.utils.set_random_seed(0)
        model = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.ones((16, 4))
        {before}
        history = model.fit(x, x[:, :1], batch_size=8, epochs=epochs, verbose=0, callbacks=[Interrupt()])
        beside.seen.append((history.history["loss"], len(model.layers[0].kernel.value.sharding.device_set), __file__, sys.argv))
        {after}
"""


def plan(captured):
    return BASELINES["data parallel"](captured.graph, "host", mesh_for((4,)))


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("seen = []\n")
    monkeypatch.delitem(sys.modules, "beside", raising=False)

    def write(before="", after="", callback="pass"):
        path = tmp_path / "train.py"
        text = textwrap.dedent(TRAIN)
        path.write_text(
            text.format(before=before or "pass", after=after or "pass", callback=callback)
        )
        return path

    return write


def seen():
    return sys.modules["beside"].seen


def test_a_script_trains_as_planned_and_everything_is_put_back(script):
    path, argv, main, method = (
        script(),
        sys.argv,
        sys.modules["__main__"],
        keras.Model.make_train_function,
    )
    said = []
    assert run_script(Script(path, ["--epochs", "2"]), plan, report=said.append, verify=True) == 0
    ((loss, devices, file, arguments),) = seen()
    assert (len(loss), devices, file, arguments) == (2, 4, str(path), [str(path), "--epochs", "2"])
    assert "all_reduce: 200 B planned, 200 B emitted" in said
    assert any("one step as planned and on one device" in line for line in said)
    assert (sys.argv, sys.modules["__main__"], keras.Model.make_train_function) == (
        argv,
        main,
        method,
    )
    assert str(path.parent) not in sys.path


def test_a_step_of_jax_is_compared_with_one_device(tmp_path):
    path = tmp_path / "step.py"
    path.write_text(
        textwrap.dedent("""
        import jax, numpy as np, partita

        def step(w, x):
            loss, gradient = jax.value_and_grad(lambda w: jax.numpy.mean((x @ w) ** 2))(w)
            return w - 0.1 * gradient, loss

        x = np.ones((8, 4), "float32")
        partita.parallelize(step, (x[:4], x))(x[:4], x)
        """)
    )
    said = []
    assert run_script(Script(path), plan, report=said.append, verify=True) == 0
    title = "one step as planned and on one device: 2 values compared, largest differences"
    assert title in said


@pytest.mark.parametrize(
    ("end", "code", "printed"),
    [("sys.exit(7)", 7, ""), ("sys.exit('bye')", 1, "bye\n"), ("sys.exit()", 0, "")],
)
def test_sys_exit_is_passed_on(script, capsys, end, code, printed):
    assert run_script(Script(script(before=end)), plan) == code
    assert capsys.readouterr().err == printed


def test_an_error_of_the_script_shows_the_scripts_frames_only(script, capsys):
    path = script(before="raise ValueError('mine')")
    assert run_script(Script(path), plan) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(
        f'Traceback (most recent call last):\n  File "{path}", line 19, in <module>\n'
    )
    assert shown.endswith("ValueError: mine\n")
    assert run_script(Script(script(callback="raise ValueError('in training')")), plan) == 1
    shown = capsys.readouterr().err
    assert "partita/keras" not in shown
    assert shown.endswith("ValueError: in training\n")
    path.write_text("x = 1\ndef f(:\n")
    assert run_script(Script(path), plan) == 1
    assert capsys.readouterr().err.startswith(f'  File "{path}", line 2\n')


def test_ctrl_c_in_training_is_one_sentence_and_130(script):
    said = []
    path = script(callback="raise KeyboardInterrupt")
    assert run_script(Script(path), plan, report=said.append) == 130
    assert said[-1] == f"{path} was interrupted; its models keep the training up to then."


def test_plan_script_stops_at_the_first_training_call(script):
    captured = plan_script(Script(script(after="raise SystemError('went on')")))
    assert captured.graph.batch_size == 8
    assert seen() == []
    assert keras.Model.fit.__qualname__ == "JAXTrainer.fit"


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (
            "sys.exit(3)",
            r"called sys.exit\(3\) before it trained anything, so there is nothing to plan\.",
        ),
        (
            "raise ValueError",
            r"raised ValueError before it trained anything, so there is nothing to plan\.",
        ),
        (
            "model.fit = lambda *a, **k: sys.modules['__main__'].Nothing",
            "raised AttributeError before",
        ),
        ("class Own: history = {'loss': 0}; model.fit = lambda *a, **k: Own", "raised"),
    ],
)
def test_a_script_without_training_has_nothing_to_plan(script, before, says):
    with pytest.raises(CaptureError, match=says):
        plan_script(Script(script(before=before)))


def test_a_script_that_does_not_exist_or_does_not_train(tmp_path):
    with pytest.raises(
        PartitaError, match="There is no script 'nowhere.py'. Give the path of a Python file."
    ):
        run_script(Script("nowhere.py"), plan)
    with pytest.raises(PartitaError, match="cannot be read: Is a directory"):
        run_script(Script(tmp_path), plan)
    (tmp_path / "still.py").write_text("x = 1\n")
    assert run_script(Script(tmp_path / "still.py"), plan) == 0
    with pytest.raises(
        CaptureError, match="ended without calling fit or train_on_batch of a Keras model"
    ):
        plan_script(Script(tmp_path / "still.py"))


def test_keras_on_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(
        PartitaError,
        match="already imported on the torch backend, .* Set KERAS_BACKEND=jax before importing",
    ):
        run_script(Script("train.py"), plan)


def test_a_model_that_makes_its_own_train_function_trains_alone_and_says_so(script):
    said = []
    own = "type(model).make_train_function = lambda self, force=False: keras.Model.make_train_function(self, force)"
    before = f"model.__class__ = type('Own', (keras.Sequential,), {{}}); {own}"
    assert (
        run_script(
            Script(script(before=before + "; model.compile('sgd', 'mse')")),
            plan,
            report=said.append,
        )
        == 0
    )
    assert seen()[0][1] == 1
    assert said == [
        "'Own' makes its own train function, which cannot be planned. Override "
        "train_step instead of make_train_function. It trains on one device, as Keras runs it."
    ]


OWN_LOOP = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import jax
step = jax.jit(lambda weights, x: weights - 0.1 * x.sum())
print(step(1.0, jax.numpy.ones(3)))
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"])
def test_a_loop_of_ones_own_is_told_how_to_become_parallel(tmp_path, end):
    (tmp_path / "loop.py").write_text(OWN_LOOP + end)
    said = []
    assert run_script(Script(tmp_path / "loop.py"), plan, report=said.append) == 0
    assert said == [
        "The script sets KERAS_BACKEND=torch, and Keras runs on JAX here",
        NOTHING_PARALLEL,
    ]


def test_a_script_that_fails_is_not_told_about_devices(tmp_path):
    (tmp_path / "loop.py").write_text("raise SystemExit(3)")
    said = []
    assert run_script(Script(tmp_path / "loop.py"), plan, report=said.append) == 3
    assert said == []


def test_a_module_runs_as_after_python_m(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "ownpackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text("size = 3")
    names = "print(size, sys.argv, __name__, __package__, __file__)"
    (package / "train.py").write_text(f"import sys\nfrom .data import size\n{names}")
    (package / "__main__.py").write_text("print('the package', __package__)")
    try:
        train = Script("ownpackage.train", ["--epochs", "3"], as_module=True)
        assert run_script(train, plan) == 0
        assert run_script(Script("ownpackage", as_module=True), plan) == 0
    finally:
        sys.modules.pop("ownpackage", None)
        sys.modules.pop("ownpackage.data", None)
    first, second, _ = capsys.readouterr().out.split("\n")
    file = package / "train.py"
    assert first == f"3 ['{file}', '--epochs', '3'] __main__ ownpackage {file}"
    assert second == "the package ownpackage"


def test_a_compiled_script_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.pyc"
    path.write_bytes(b"a\0b")
    with pytest.raises(PartitaError, match="train.pyc' is no Python source: it has null bytes."):
        run_script(Script(str(path)), print)


def test_a_script_may_be_a_pipe_and_finds_its_data_after_a_change_of_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("import os; os.chdir('/'); print(__file__)")
    assert run_script(Script("train.py"), plan) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'train.py'}\n"
    reader, writer = os.pipe()
    os.write(writer, b"print('from a pipe')")
    os.close(writer)
    assert run_script(Script(f"/dev/fd/{reader}"), plan) == 0
    os.close(reader)
    assert capsys.readouterr().out == "from a pipe\n"
    with pytest.raises(PartitaError, match=r"'train.ipynb' is a notebook. Call partita.parallel"):
        run_script(Script("train.ipynb"), plan)


@pytest.mark.parametrize("name", ["nopackage.train", "nopackage", "json.nothing", ".own"])
def test_a_module_that_does_not_exist_is_named(name):
    with pytest.raises(PartitaError, match=f"There is no module '{re.escape(name)}' to run"):
        run_script(Script(name, as_module=True), plan)


def test_a_package_without_a_main_module_is_told_to_name_a_module():
    with pytest.raises(PartitaError, match=r"'keras' has no __main__.py .* such as keras.train"):
        run_script(Script("keras", as_module=True), plan)


def test_devices_at_hand():
    machine = detect()
    assert machine.devices == 8
    assert detect(2).memory_bytes == pytest.approx(4 * machine.memory_bytes, rel=1e-6)
    with pytest.raises(
        PartitaError,
        match=r"Cannot use 9 devices: JAX has 8 \(CPU\). Start with more: partita run --devices 9",
    ):
        detect(9)
    request_cpu_devices(8)
    with pytest.raises(
        PartitaError, match="JAX has already started with 8 CPU devices, and 9 are needed"
    ):
        request_cpu_devices(9)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100:4"),
        ("NVIDIA A100-SXM4-40GB", "a100:4"),
        ("TPU v5 lite", "tpu-v5e:4"),
        ("Mystery 1", "Mystery 1:4"),
    ],
)
def test_a_kind_of_accelerator_is_its_preset_or_a_generic_one_with_the_memory_that_jax_reports(
    kind, name
):
    machine = accelerator(kind, 4, 30 << 30)
    assert (machine.name, machine.devices, machine.memory_bytes) == (name, 4, 30 << 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerator(kind, 1, None).rate("dot", "bfloat16") > 1e12
