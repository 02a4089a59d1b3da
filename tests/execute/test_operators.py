"""Measured operators: the programs that are cut out, and the stored and fitted times."""

import json
from dataclasses import replace

import keras
import pytest
from jax.extend.mlir import ir
from keras import layers

import partita
from partita.bench.fidelity import pipeline
from partita.capture import stablehlo
from partita.capture.program import capture_program
from partita.errors import PlanError
from partita.execute import operators
from partita.execute.devices import detect
from partita.files.checksums import with_checksum
from partita.planning import SearchOptions, predict_plan, search_plan
from partita.plans.layout import operator_assignments
from partita.search.find import find


@pytest.fixture
def captured(monkeypatch, tmp_path):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    convolutions = [
        layers.Conv2D(8, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dropout(0.5),
    ]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            *convolutions,
            layers.Dense(32, activation="relu"),
            layers.Dense(4),
        ]
    )
    model.compile("adam", "mse")
    return capture_program(model, 8)


def cut(captured, plan, name):
    graph = captured.graph
    o = next(i for i, operator in enumerate(graph.operators) if operator.name == name)
    with stablehlo.context(), ir.Location.unknown():
        cutter = operators.Cutter(stablehlo.parse(captured.text.mlir_module_serialized), graph)
        return cutter.parts(o, operator_assignments(graph, plan)[o], plan.mesh)


def test_a_part_is_the_program_of_one_device(captured):
    result = find(captured.graph, detect(2))
    name = next(o.name for o in captured.graph.operators if o.path.startswith("dense"))
    local = {
        "one device": ((8, 128), (128, 32), (8, 32)),
        "data parallel": ((4, 128), (128, 32), (4, 32)),
        "tensor parallel": ((8, 64), (64, 32), (8, 32)),
    }
    for plan, (x, w, y) in local.items():
        forward, backward = cut(captured, result.baselines[plan][0], name)
        assert (
            forward.text.count("stablehlo.dot_general"),
            backward.text.count("stablehlo.dot_general"),
        ) == (1, 2)
        assert {x, w} <= {s.shape for s in forward.operands} and y in {
            s.shape for s in forward.results
        }, plan
        assert {x, w} <= {s.shape for s in backward.results}, (
            "the gradients of the input and of the weight, or the new weight"
        )


def test_every_operator_of_every_plan_is_measured_with_its_status(captured):
    machine = detect(2)
    result = search_plan(captured, machine, SearchOptions(measure_operators=True))
    assert {o.name for o in result.prediction.operators if o.source != "measured"} == set()
    assert "100% measured operator by operator" in result.plan.predicted["provenance"]["seconds"]
    assert predict_plan(captured.graph, machine, result.plan).operators[0].source == "roofline"
    assert all(
        o.compute > 0 for o in result.prediction.operators if o.name.startswith(("conv", "dense"))
    )


def test_operators_of_a_pipeline_are_measured_on_a_microbatch(captured):
    machine = detect(2)
    plan = pipeline(captured.graph, find(captured.graph, machine))
    assert plan is not None and plan.microbatches == 4
    timed = operators.measured_operators(captured, machine, [plan])
    predicted = predict_plan(captured.graph, timed, plan)
    assert {operator.source for operator in predicted.operators} == {"measured"}


def test_times_are_stored_for_equal_operators_of_other_models(captured):
    machine, told = detect(2), []
    plans = [p for p, _ in find(captured.graph, machine).baselines.values()]
    first = operators.measured_operators(
        captured, machine, plans, lambda done, whole: told.append(whole)
    )
    again = operators.measured_operators(
        captured, machine, plans, lambda done, whole: told.append(whole)
    )
    assert told and len(told) == 1, "the second time nothing is timed"
    assert first.times.seconds == again.times.seconds
    path = operators.file_of_operators(machine)
    kept = json.loads(path.read_text())
    assert len(kept["operators"]) == first.times.samples
    kept["key"]["jaxlib"] = "0.0.1"
    del kept["checksum"]
    path.write_text(json.dumps(with_checksum(kept)))
    operators.measured_operators(captured, machine, plans, lambda done, whole: told.append(whole))
    assert len(told) == 2, "figures of another jaxlib are not taken"


def test_a_window_split_in_space_computes_its_part_of_the_result(monkeypatch, tmp_path):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    model = keras.Sequential(
        [
            keras.Input((16, 16, 4)),
            layers.Conv2D(8, 3, strides=2, padding="same"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    model.compile("sgd", "mse")
    c, machine = capture_program(model, 8), detect(2)
    plan = find(c.graph, machine).baselines["spatial"][0]
    forward, backward = cut(
        c, plan, next(o.name for o in c.graph.operators if o.path.startswith("conv"))
    )
    assert (8, 8, 16, 4) in {
        s.shape for s in forward.operands
    } and "tensor<8x4x8x8xf32>" in forward.text
    assert (3, 3, 4, 8) in {s.shape for s in backward.results}, (
        "the gradient or the new value of the whole kernel"
    )
    machine = operators.measured_operators(c, machine, [plan])
    assert {
        o.source
        for o in predict_plan(c.graph, machine, plan).operators
        if o.name.startswith("conv")
    } == {"measured"}


def test_unmeasured_operators_are_fitted_with_the_correction_of_their_kind(captured):
    machine = detect(2)
    plans = {n: p for n, (p, _) in find(captured.graph, machine).baselines.items()}
    machine = operators.measured_operators(captured, machine, [plans["data parallel"]])
    other = predict_plan(captured.graph, machine, plans["tensor parallel"])
    assert "fitted" in {o.source for o in other.operators}
    assert "fitted to such measurements" in other.to_json()["provenance"]["seconds"]
    slow = replace(
        machine,
        times=replace(
            machine.times,
            corrections={digest: 2 * ratio for digest, ratio in machine.times.corrections.items()},
        ),
    )
    for before, after in zip(
        other.operators,
        predict_plan(captured.graph, slow, plans["tensor parallel"]).operators,
        strict=True,
    ):
        assert after.compute == pytest.approx(
            before.compute * (2 if before.source == "fitted" else 1)
        )


def test_a_loop_is_measured_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    model = keras.Sequential([keras.Input((6, 4)), layers.LSTM(8), layers.Dense(4)])
    model.compile("sgd", "mse")
    c = capture_program(model, 8)
    plan = find(c.graph, detect(2)).baselines["data parallel"][0]
    forward, backward = cut(
        c, plan, next(o.name for o in c.graph.operators if o.path.startswith("lstm"))
    )
    assert forward.text.count("stablehlo.while") == backward.text.count("stablehlo.while") == 1
    assert (4, 6, 4) in {s.shape for s in forward.operands}, "half of the batch of 8"


def test_only_local_devices_are_measured(captured):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model.compile("sgd", "mse")
    with pytest.raises(
        PlanError, match=r"on the local devices only, and the plan is for the machine 'dgx-h100:8'"
    ):
        partita.plan(model, 8, machine="dgx-h100:8", measure_operators=True)


def test_a_spatial_part_slower_than_the_whole_operator_is_discarded(monkeypatch, tmp_path):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(8, 3, padding="same"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    model.compile("sgd", "mse")
    c, machine = capture_program(model, 8), detect(2)
    plans = {n: p for n, (p, _) in find(c.graph, machine).baselines.items()}
    slow = {"spatial": 3.0, "one device": 1.0, "data parallel": 2.0}
    for name, source in {"spatial": "fitted", "data parallel": "measured"}.items():
        chosen = [plans["one device"], plans[name]]
        monkeypatch.setattr(
            operators,
            "_timed",
            lambda chunk, devices, name=name: [
                slow[name] if set(a.key[2]) > {1} else 1.0 for a in chunk
            ],
        )
        monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / name))
        found = operators.measured_operators(c, machine, chosen)
        assert {
            o.source
            for o in predict_plan(c.graph, found, plans[name]).operators
            if o.name.startswith("conv")
        } == {source}


def test_runs_for_which_the_system_clears_memory_do_not_count():
    program = operators._Program(0, operators.Part(b"", (), (), "", {}), None, [])
    program.runs = [(0.096, 20482), (0.036, 8576), (0.012, 3), (0.011, 0), (0.013, 0)]
    assert program.settled == [0.012, 0.011, 0.013]
    program.runs = [(0.096, 20482), (0.098, 20480)]  # new memory in every run, as in its steps
    assert program.settled == [0.096, 0.098]
