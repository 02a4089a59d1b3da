"""The papers' networks have the papers' sizes, and their published plans are never better than
what is found for them.
"""

import json
from collections.abc import Iterator

import pytest
import typer.testing

from partita.bench.networks import NETWORKS, model
from partita.bench.papers import cases, on_links, run
from partita.bench.published import layers_on_devices, one_weird_trick, optcnn_vgg16
from partita.capture.program import capture_program
from partita.cli.main import app
from partita.errors import PartitaError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import data_parallel
from partita.search.find import mesh_of
from partita.search.portfolio import MIN_GAIN
from partita.simulation.simulate import simulate

COUNTS = {
    "lenet": 61_706,  # LeCun 1998 with all of conv2 connected
    "alexnet": 61_100_840,  # torchvision's alexnet
    "vgg16": 138_357_544,  # keras.applications
    "inception-v3": 23_851_784,
    "resnet-101": 44_707_176,
    "rnntc": 32_000 * 1024 + 4 * 8 * (1024 * 1024 + 512) + 2 * 1025,
    "rnnlm": 32_000 * 2048 + 2 * 8 * (2048 * 2048 + 1024) + 32_000 * 2049,
    "rnnlm-2": 32_000 * 2048 + 2 * 8 * (2048 * 2048 + 1024) + 32_000 * 2049,
    "nmt": 2 * 32_000 * 1024 + 4 * 8 * (1024 * 1024 + 512) + 2 * 1024 * 1024 + 32_000 * 1025,
    "llama": 8_030_261_248,  # Meta-Llama-3-8B
    "gpt3": 96 * 12 * 12288**2 + (2 * 51_200 + 2048) * 12288 + 96 * 13 * 12288 + 2 * 12288,
}


def test_every_network_has_a_known_size() -> None:
    assert COUNTS.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_published_number_of_parameters_and_allocates_none(name: str) -> None:
    built = model(name)
    assert built.count_params() == COUNTS[name]
    assert all(v._value is None for v in built.variables)


def test_building_a_network_in_16_bit_leaves_the_dtype_policy_as_it_was() -> None:
    assert {layer.compute_dtype for layer in model("llama").layers[1:4]} == {"bfloat16"}
    assert model("lenet").layers[0].compute_dtype == "float32"


@pytest.fixture(scope="module")
def vgg16() -> OperatorGraph:
    return capture_program(model("vgg16"), 128).graph


def test_every_step_of_a_recurrent_layer_is_operators_of_its_own() -> None:
    graph = capture_program(model("rnnlm-2"), 8).graph
    assert sum(o.path.startswith("lstm0") and o.kind == "dot" for o in graph.operators) == 2 * 2


# --------------------------------------------------------------------------------------------------------------
# plans


def test_optcnns_plan_splits_the_last_convolutions_in_space_and_the_dense_layers_by_parameter(
    vgg16: OperatorGraph,
) -> None:
    text = optcnn_vgg16(vgg16, "p100-cluster", mesh_of(load("p100-cluster:1"))).to_json()[
        "operators"
    ]
    assert text["block1_conv1"] == "S:a,b"
    assert text["block5_conv3"] == "A1:a A2:b"
    assert (text["fc1"], text["fc2"], text["predictions"]) == ("P:a,b", "P:a,b", "P:a")


def test_experts_split_samples_over_nodes_and_give_every_recurrent_layer_a_device_of_its_own() -> (
    None
):
    graph, where = capture_program(model("rnnlm-2"), 16).graph, load("k80-cluster:4")
    plan = layers_on_devices(graph, "k80-cluster", mesh_of(where))
    text = plan.to_json()["operators"]
    assert {text[name] for name in text if name.startswith(("embedding", "lstm0"))} == {
        "S:a,b at(0):c,d"
    }
    assert {text[name] for name in text if name.startswith("lstm1")} == {
        "S:a,b at(0):c at(1):d"
    } and text["logits"] == "S:a,b P:c,d"
    timeline = simulate(graph, where, plan)
    assert timeline.groups == 4
    kernels = [s for s in timeline.spans if s.kind == "compute"]
    assert {s.group for s in kernels if s.operator.startswith("lstm0")} == {"c=0 d=0"} and {
        s.group for s in kernels if s.operator.startswith("lstm1")
    } == {"c=0 d=1"}
    assert (
        {s.group for s in kernels if s.operator == "logits"}
        == set(dict.fromkeys(s.group for s in kernels))
        == {f"c={c} d={d}" for c in (0, 1) for d in (0, 1)}
    )


@pytest.mark.parametrize(("network", "batch"), [("lenet", 32), ("alexnet", 32), ("vgg16", 32)])
def test_what_is_published_is_never_better_than_what_is_found(network: str, batch: int) -> None:
    (case,) = (c for c in cases(network, "p100-cluster", 4) if c.batch == batch)
    plans = run(case).plans
    assert {"data parallel", "expert", "found"} <= plans.keys()
    assert ("OptCNN's" in plans) == (network == "vgg16")
    for name, figures in plans.items():
        assert plans["found"].additive_seconds <= figures.additive_seconds * (1 + 1e-9), name
        assert plans["found"].seconds <= figures.seconds * (1 + MIN_GAIN), name


def test_operators_of_the_papers_networks_may_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def none_faster(graph: OperatorGraph, *arguments: object, **options: object) -> Iterator[None]:
        asked.append(graph.name)
        return iter(())

    monkeypatch.setattr("partita.search.find.placements", none_faster)
    run(cases("lenet", "p100-cluster", 4)[0])
    assert asked == ["lenet"]


# ------------------------------------------------------------------------------------------------------------
# figures


def test_what_a_collective_puts_on_links() -> None:
    assert (
        on_links("all_reduce", 64)
        == 2 * on_links("reduce_scatter", 64)
        == 2 * on_links("all_gather", 64)
        == 126 / 64
    )
    assert on_links("collective_permute", 64) == 1


def test_data_parallel_sends_every_gradient_once_around_the_ring() -> None:
    case = cases("alexnet", "p100-cluster", 4)[0]
    gradients = 2 * (4 - 1) * 4 * COUNTS["alexnet"]  # 2 (n-1) times their bytes, over all devices
    assert run(case).plans["data parallel"].sent_bytes == pytest.approx(gradients, rel=1e-4)


def test_cells_are_the_papers() -> None:
    chosen = cases()
    assert len([c for c in chosen if c.paper == "FlexFlow"]) == 6 * (5 + 5 + 3)
    assert {c.network for c in chosen if c.paper == "OptCNN"} == {
        "lenet",
        "alexnet",
        "vgg16",
        "inception-v3",
    }
    assert {c.devices for c in chosen if c.network == "lenet"} == {4, 8, 16}
    assert {(c.network, c.devices) for c in chosen if not c.paper} == {
        ("llama", 64),
        ("gpt3", 1024),
    }


@pytest.mark.parametrize(
    ("only", "devices", "says"),
    [("resnet", None, "use one of lenet, alexnet"), ("lenet", 64, "use 4, 8")],
)
def test_a_cell_that_is_not_there_is_one_sentence(
    only: str, devices: int | None, says: str
) -> None:
    with pytest.raises(PartitaError, match=says):
        cases(only, None, devices)


def test_the_command_prints_tables_and_json() -> None:
    runner = typer.testing.CliRunner()
    arguments = ["bench", "papers", "--only", "lenet", "--devices", "4"]
    shown = runner.invoke(app, arguments)
    (row,) = json.loads(runner.invoke(app, [*arguments, "--json"]).output)
    assert shown.exit_code == 0 and "OptCNN's networks on p100-cluster" in shown.output
    assert (
        0 <= row["gap"] < 0.05
        and ("proved" if row["gap"] < 1e-6 else f"{row['gap']:.2%}") in shown.output
    )
    assert row["case"]["devices"] == 4 and row["plans"]["found"]["seconds"] > 0


def test_the_published_figures_stand_beside_ours() -> None:
    shown = typer.testing.CliRunner().invoke(
        app, ["bench", "papers", "--only", "vgg16", "--devices", "2"]
    )
    assert (
        "first dense layer by sample / by parameter: published 408 / 32 MB sent; here"
        in shown.output
    )


def test_one_weird_trick_is_data_parallel_for_convolutions(vgg16: OperatorGraph) -> None:
    mesh = mesh_of(load("p100-cluster:1"))
    trick, plain = one_weird_trick(vgg16, "m", mesh), data_parallel(vgg16, "m", mesh)
    differs = [o.name for o in vgg16.operators if trick.choices[o.name] != plain.choices[o.name]]
    assert differs == ["fc1", "fc2", "predictions"]
