"""Programs of the zoo: training steps in JAX, as its libraries spell them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from jax import lax

from zoo.programs import Par, images, program, tokens, vectors


def batches(x: Any, y: Any, size: int = 12) -> Any:
    """Batches of a size; the last one is smaller."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def dense(key: Any, *sizes: int) -> list[dict[str, Any]]:
    keys = jax.random.split(key, len(sizes))
    return [
        {"w": jax.random.normal(k, (a, b)) * a**-0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]


def forward(layers: Any, x: Any) -> Any:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def cross_entropy(logits: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def with_optax(par: Par, params: Any, loss: Any, data: Any, optimizer: Any = None) -> Any:
    """Trains by an Optax optimizer: `step(params, opt_state, batch)`."""
    optimizer = optimizer or optax.sgd(0.05, momentum=0.9)

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    step = par(step, (params, opt_state, data[0]))
    for batch in data:
        params, opt_state, value = step(params, opt_state, batch)
        losses.append(value)
    return losses, params


@program("plain JAX: a list of layers, gradient descent by hand")
def plain_sgd(par: Par) -> Any:
    data = batches(*vectors())

    def train_step(params: Any, x: Any, y: Any) -> Any:
        value, gradients = jax.value_and_grad(lambda p: cross_entropy(forward(p, x), y))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    params = dense(jax.random.key(0), 12, 24, 18, 4)
    step, losses = par(train_step, (params, *data[0])), []
    for x, y in data:
        params, value = step(params, x, y)
        losses.append(value)
    return losses, params


@program("Optax: Adam in a chain with clipping and a schedule")
def optax_chain(par: Par) -> Any:
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 20))
    )
    params = dense(jax.random.key(0), 12, 24, 4)
    return with_optax(
        par, params, lambda p, x, y: cross_entropy(forward(p, x), y), batches(*vectors()), chain
    )


@program("a jitted step with donated state; the loss comes first, the state nested in the result")
def jitted_donated(par: Par) -> Any:
    data = batches(*vectors())

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state: Any, x: Any, y: Any) -> Any:
        value, gradients = jax.value_and_grad(lambda p: cross_entropy(forward(p, x), y))(
            state["params"]
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradients)
        return value, {
            "state": {"params": params, "step": state["step"] + 1},
            "norm": optax.tree.norm(gradients),
        }

    state = {"params": dense(jax.random.key(0), 12, 24, 4), "step": jnp.zeros((), "int32")}
    run, seen = par(step, (state, *data[0])), []
    for x, y in data:
        value, more = run(state, x, y)
        state = more["state"]
        seen.append((value, more["norm"]))
    return seen, state


@program("a jitted step that does not donate: the old state stays usable")
def jitted_kept(par: Par) -> Any:
    x, y = batches(*vectors())[0]

    @jax.jit
    def step(params: Any, x: Any, y: Any) -> Any:
        gradients = jax.grad(lambda p: cross_entropy(forward(p, x), y))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    params = dense(jax.random.key(0), 12, 24, 4)
    run = par(step, (params, x, y))
    once = run(params, x, y)
    return once, run(once, x, y), run(params, x, y), params


@program("static arguments, keyword arguments, Python numbers")
def static_and_keywords(par: Par) -> Any:
    x, y = batches(*vectors())[0]

    def step(params: Any, x: Any, y: Any, kind: str, rate: float = 0.1, *, power: int = 2) -> Any:
        def loss(p: Any) -> Any:
            out = forward(p, x)
            return (
                jnp.mean(jnp.abs(out - y[:, None]) ** power)
                if kind == "power"
                else cross_entropy(out, y)
            )

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), value

    params, losses = dense(jax.random.key(0), 12, 24, 4), []
    run = par(step, (params, x, y, "power"))
    for rate in (0.1, 0.05):
        params, value = run(params, x, y, "power", rate, power=2)
        losses.append(value)
    params, value = run(params, x, y, "entropy")
    return [*losses, value], params


@program("random keys in the state: dropout, old and new keys")
def random_keys(par: Par) -> Any:
    data = batches(*vectors())

    def step(params: Any, key: Any, old: Any, x: Any, y: Any) -> Any:
        key, now = jax.random.split(key)
        keep = jax.random.bernoulli(now, 0.8, x.shape) & jax.random.bernoulli(old, 0.9, x.shape)
        value, gradients = jax.value_and_grad(
            lambda p: cross_entropy(forward(p, jnp.where(keep, x, 0)), y)
        )(params)
        return (
            jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients),
            key,
            jax.random.split(old)[0],
            value,
        )

    params, key, old = dense(jax.random.key(0), 12, 24, 4), jax.random.key(3), jax.random.PRNGKey(4)
    run, losses = par(step, (params, key, old, *data[0])), []
    for x, y in data:
        params, key, old, value = run(params, key, old, x, y)
        losses.append(value)
    return losses, params, jax.random.key_data(key)


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape((x.shape[0], -1))
        return nn.Dense(4)(nn.Dropout(0.2, deterministic=not train)(nn.Dense(16)(x)))


class NormState(train_state.TrainState):
    batch_stats: Any = None


@program("Linen: TrainState, batch statistics, dropout")
def linen_cnn(par: Par) -> Any:
    data = batches(*images())
    model = LinenCnn()
    made = model.init(jax.random.key(0), data[0][0], False)
    state = NormState.create(
        apply_fn=model.apply,
        params=made["params"],
        tx=optax.sgd(0.05, 0.9),
        batch_stats=made["batch_stats"],
    )

    def step(state: Any, batch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            out, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch[0],
                True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return cross_entropy(out, batch[1]), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=new["batch_stats"]), {
            "loss": value
        }

    run, losses = par(step, (state, data[0], jax.random.key(1))), []
    for batch in data:
        state, logs = run(state, batch, jax.random.key(1))
        losses.append(logs["loss"])
    return losses, state.params, state.batch_stats


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Embed(24, 16)(x)
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(
                h, h, mask=nn.make_causal_mask(jnp.ones(x.shape[:2]))
            )
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(24)(nn.LayerNorm()(x))


@program("Linen transformer with causal attention, Adam")
def linen_transformer(par: Par) -> Any:
    x, _ = tokens()
    model = LinenTransformer()
    params = model.init(jax.random.key(0), x[:8])
    loss = lambda p, x, y: cross_entropy(model.apply(p, x), y)
    return with_optax(par, params, loss, batches(x, np.roll(x, -1, 1)), optax.sgd(0.1))


class NnxNet(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.first, self.norm = nnx.Linear(12, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)
        self.drop, self.second = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(self.drop(nnx.relu(self.norm(self.first(x)))))


@program("NNX: model and optimizer changed in place under nnx.jit")
def nnx_in_place(par: Par) -> Any:
    data = batches(*vectors())
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, 0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        value, gradients = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
        optimizer.update(model, gradients)
        return value

    run = par(step, (model, optimizer, *data[0]))
    losses = [run(model, optimizer, x, y) for x, y in data]
    return (
        losses,
        [np.asarray(v) for v in jax.tree.leaves(nnx.state(model, nnx.Param, nnx.BatchStat))],
        model.eval() or model(data[0][0]),
    )


@program("NNX: split into graph and state, functional")
def nnx_split(par: Par) -> Any:
    data = batches(*vectors())
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))

    def step(state: Any, x: Any, y: Any) -> Any:
        model = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
        nnx.update(
            model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), gradients)
        )
        return nnx.state(model), value

    run, losses = par(step, (state, *data[0])), []
    for x, y in data:
        state, value = run(state, x, y)
        losses.append(value)
    return losses, [
        np.asarray(v) for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, jnp.floating)
    ]


@program("Equinox: a module with functions among its leaves, filter_jit")
def equinox_mlp(par: Par) -> Any:
    data = batches(*vectors())
    model = eqx.nn.MLP(12, 4, 32, 2, key=jax.random.key(0))
    optimizer = optax.sgd(0.05, 0.9)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Any, opt_state: Any, x: Any, y: Any) -> Any:
        value, gradients = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(x), y))(
            model
        )
        updates, opt_state = optimizer.update(gradients, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    run, losses = par(step, (model, opt_state, *data[0])), []
    for x, y in data:
        model, opt_state, value = run(model, opt_state, x, y)
        losses.append(value)
    return losses, jax.tree.leaves(eqx.filter(model, eqx.is_array))


@program("scan over stacked layers with jax.checkpoint")
def scanned_layers(par: Par) -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (12, 16)) * 0.3,
        "layers": {
            "up": jax.random.normal(keys[1], (3, 16, 32)) * 0.2,
            "down": jax.random.normal(keys[2], (3, 32, 16)) * 0.2,
        },
    }

    @jax.checkpoint
    def layer(h: Any, p: Any) -> Any:
        return h + jax.nn.relu(h @ p["up"]) @ p["down"], None

    def loss(p: Any, x: Any, y: Any) -> Any:
        h, _ = lax.scan(layer, x @ p["in"], p["layers"])
        return cross_entropy(h, y)

    return with_optax(par, params, loss, batches(*vectors()))


@program("a recurrent network by lax.scan over time")
def scanned_time(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(26, 6, 5).astype("float32"), r.randint(0, 4, 26)
    params = {
        "in": r.randn(5, 12).astype("float32") * 0.3,
        "h": r.randn(12, 12).astype("float32") * 0.3,
        "out": r.randn(12, 4).astype("float32"),
    }

    def loss(p: Any, x: Any, y: Any) -> Any:
        cell = lambda h, t: (jnp.tanh(t @ p["in"] + h @ p["h"]), None)
        h, _ = lax.scan(cell, jnp.zeros((x.shape[0], 12)), jnp.swapaxes(x, 0, 1))
        return cross_entropy(h @ p["out"], y)

    return with_optax(par, params, loss, batches(x, y))


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


@program("custom_vjp, custom_jvp, named scopes")
def custom_gradients(par: Par) -> Any:
    def loss(p: Any, x: Any, y: Any) -> Any:
        with jax.named_scope("encoder"):
            h = clipped(jax.nn.silu(x @ p[0]["w"] + p[0]["b"]))
        with jax.named_scope("head"):
            return cross_entropy(h @ p[1]["w"] + p[1]["b"], y)

    return with_optax(par, dense(jax.random.key(0), 12, 24, 4), loss, batches(*vectors()))


@program("microbatches accumulated by lax.scan inside the step")
def accumulated(par: Par) -> Any:
    data = [(x.reshape(2, 6, 12), y.reshape(2, 6)) for x, y in batches(*vectors(count=24))]

    def step(params: Any, batch: Any) -> Any:
        def body(total: Any, one: Any) -> Any:
            return jax.tree.map(
                jnp.add,
                total,
                jax.grad(lambda p: cross_entropy(forward(p, one[0]), one[1]))(params),
            ), None

        gradients, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)

    params = dense(jax.random.key(0), 12, 24, 4)
    run = par(step, (params, data[0]))
    for batch in data:
        params = run(params, batch)
    return params


@jax.tree_util.register_dataclass
@dataclass
class Trainer:
    params: Any
    average: Any
    step: Any


@program("a dataclass as state, with an average of the weights; vmap over examples")
def dataclass_state(par: Par) -> Any:
    data = batches(*vectors())

    def step(state: Trainer, x: Any, y: Any) -> Any:
        loss = lambda p: jax.vmap(lambda a, b: cross_entropy(forward(p, a[None]), b[None]))(
            x, y
        ).mean()
        value, gradients = jax.value_and_grad(loss)(state.params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state.average, params)
        return Trainer(params, average, state.step + 1), value

    params = dense(jax.random.key(0), 12, 24, 4)
    state, losses = (
        Trainer(params, jax.tree.map(jnp.zeros_like, params), jnp.zeros((), "int32")),
        [],
    )
    run = par(step, (state, *data[0]))
    for x, y in data:
        state, value = run(state, x, y)
        losses.append(value)
    return losses, state.params, state.average, state.step


@program("frozen parameters as an argument that never changes; bfloat16 compute", tolerance=5e-2)
def frozen_argument(par: Par) -> Any:
    data = batches(*vectors())
    frozen, head = dense(jax.random.key(0), 12, 24, 18), dense(jax.random.key(1), 18, 4)

    def step(head: Any, frozen: Any, batch: Any) -> Any:
        def loss(head: Any) -> Any:
            h = forward(frozen, batch["x"].astype("bfloat16")).astype("float32")
            return cross_entropy(h @ head[0]["w"] + head[0]["b"], batch["y"])

        value, gradients = jax.value_and_grad(loss)(head)
        return jax.tree.map(lambda p, g: p - 0.1 * g, head, gradients), value

    frozen = jax.tree.map(lambda w: w.astype("bfloat16"), frozen)
    run, losses = par(step, (head, frozen, {"x": data[0][0], "y": data[0][1]})), []
    for x, y in data:
        head, value = run(head, frozen, {"x": x, "y": y})
        losses.append(value)
    return losses, head
