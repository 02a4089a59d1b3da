"""One sentence where a step is slow or alone: many shapes of batches, one device."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partita
from partita.execute.devices import one_device_sentence
from partita.execute.function import MANY_SHAPES
from partita.execute.process_arrays import digest, put


def step(weights: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w["w"]) ** 2))(weights)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), loss


def test_many_shapes_of_batches_are_pointed_out_once() -> None:
    said: list[str] = []
    weights = {"w": jnp.ones((4, 4))}
    planned = partita.parallelize(step, (weights, jnp.ones((8, 4))), say=said.append)
    for size in range(1, MANY_SHAPES + 3):
        weights, _ = planned(weights, jnp.ones((size, 4)))
    sentences = [sentence for sentence in said if "compiled anew" in sentence]
    assert sentences == [
        "'step' has had batches of 5 shapes, and each is compiled anew. Pad batches to a few "
        "lengths, and leave out a smaller last one."
    ]


@pytest.mark.parametrize(
    ("platform", "fix"),
    [("cpu", "partita run --devices 4 train.py"), ("gpu", "plan for one: partita plan")],
)
def test_one_device_is_said_with_the_way_to_more(
    platform: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one_device_sentence() == ""
    device = SimpleNamespace(platform=platform, device_kind="NVIDIA H100")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert one_device_sentence().startswith("JAX has one device")
    assert fix in one_device_sentence()


def test_parallelize_warns_of_one_device_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    arguments = ({"w": jnp.ones((4, 4))}, jnp.ones((8, 4)))
    partita.parallelize(step, arguments, devices=1)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="JAX has one device"):
        partita.parallelize(step, arguments)


def test_processes_compare_states_with_typed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    digests: list[str] = []
    compared = lambda captured, plan, values: digests.append(digest(values))
    monkeypatch.setattr("partita.execute.function.same_everywhere", compared)

    def dropped(
        state: dict[str, jax.Array], x: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        key, _ = jax.random.split(state["key"])
        weights, loss = step({"w": state["w"]}, x)
        return {**weights, "key": key}, loss

    for seed in (0, 0, 1):
        state = {"w": jnp.ones((4, 4)), "key": jax.random.key(seed)}
        partita.parallelize(dropped, (state, jnp.ones((8, 4))), devices=1)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.filterwarnings("error")
def test_values_of_64_bits_are_put_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partita.execute.process_arrays.alone", lambda: False)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    labels, weights, step = put((np.arange(4), np.ones(4), 3), device)
    assert (labels.dtype, weights.dtype, step.dtype) == ("int32", "float32", "int32")


@pytest.mark.parametrize(
    ("plan", "reason"),
    [("found", "one of 4 devices is used"), ("tp", "'tensor parallel' splits no operator here")],
)
def test_a_plan_for_one_device_says_why(plan: str, reason: str) -> None:
    said: list[str] = []
    arguments = ({"w": jnp.ones((1, 1))}, jnp.ones((8, 1)))
    partita.parallelize(step, arguments, devices=4, plan=plan, say=said.append)
    assert said[0].startswith(f"'step' on host:4: {reason}"), said


def test_a_plan_for_several_devices_says_how_many_and_the_splits() -> None:
    said: list[str] = []
    arguments = ({"w": jnp.ones((4, 4))}, jnp.ones((8, 4)))
    partita.parallelize(step, arguments, devices=4, plan="dp", say=said.append)
    assert said[0].startswith("'step' on host:4: 1 of 1 operators by S; "), said
