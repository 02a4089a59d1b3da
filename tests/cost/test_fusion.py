"""Kernels of programs as deep as the largest networks."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.backends.base import FusionRules
from partita.cost.fusion import fusion, unwritten_products
from partita.graph.operator_graph import producers
from partita.machine import load


def test_a_value_read_again_thousands_of_instructions_later_is_followed_to_its_readers():
    def step(w, x):
        shared = y = x * w + x
        for _ in range(1500):
            y = jnp.tanh(y) + 1.0
        return w - jnp.sum(y * shared)

    args = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=args).graph
    assert len(graph.instructions) > 3000
    for duplicates in (False, True):
        rules = FusionRules(duplicates, cheap_elementwise=False, reads_written=False)
        inside = {i for kernel in fusion(graph, rules).kernels.values() for i in kernel}
        assert {i for i, x in enumerate(graph.instructions) if x.name == "tanh"} <= inside


def test_only_a_compiler_with_fast_elementwise_instructions_computes_them_again():
    def step(w, x):
        y = jnp.exp(x * w)
        return w - jnp.sum(y, axis=0) * jnp.sum(jnp.transpose(y), axis=1), y @ y

    args = (jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    exponential = next(i for i, x in enumerate(graph.instructions) if x.name == "exponential")

    def copies(cheap):
        rules = FusionRules(duplicates=False, cheap_elementwise=cheap, reads_written=False)
        return len(fusion(graph, rules).computed_in[exponential])

    assert copies(False) == 1
    assert copies(True) > 1


def test_a_value_that_must_be_written_is_read_by_all_its_readers():
    def step(w, x):
        centred = x - w
        # The product needs the centred values in memory; the update could compute them again.
        return w - 0.1 * jnp.max(centred * x, axis=1), centred @ centred

    args = (jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    centred = next(
        i
        for i, x in enumerate(graph.instructions)
        if x.name == "subtract" and len(graph.tensors[x.results[0]].shape) == 2
    )

    def copies(reads_written):
        rules = FusionRules(False, cheap_elementwise=True, reads_written=reads_written)
        return len(fusion(graph, rules).computed_in[centred])

    assert copies(False) > 1
    assert copies(True) == 1


def test_a_softmax_is_one_kernel_where_kernels_compute_rows():
    def step(w, x):
        p = jax.nn.softmax(x * w)
        return w - jnp.sum(p * x, axis=1), jnp.argmax(p, axis=1)

    args = (jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    division = next(i for i, x in enumerate(graph.instructions) if x.name == "divide")
    sums = frozenset(i for i, x in enumerate(graph.instructions) if x.name == "reduce")

    def kernels(longest_row, split_rows=frozenset()):
        rules = FusionRules(False, True, reads_written=True, longest_row=longest_row)
        return fusion(graph, rules, split_rows).kernels

    def sums_inside(kernel):
        return len(sums & set(kernel))

    # The maximum of a row and its sum are in the kernel of the division, which argmax reads.
    assert sums_inside(kernels(64)[division]) == 2
    # Longer rows have several kernels, and each reader divides again.
    assert division not in kernels(63)
    assert division not in kernels(0)
    # Rows that are spread over devices have no such kernel.
    assert division not in kernels(64, split_rows=sums)


def test_products_may_compute_their_operands():
    def step(w, x):
        gate = jnp.tanh(x * w)
        return w - jnp.mean(gate), gate @ x, gate.T @ x

    args = (jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    tanh = next(i for i, x in enumerate(graph.instructions) if x.name == "tanh")

    def is_written(fuses_operands):
        rules = FusionRules(True, True, reads_written=True, fuses_operands=fuses_operands)
        return tanh in fusion(graph, rules).kernels

    assert is_written(False)
    assert not is_written(True)


def test_a_long_chain_is_not_computed_again():
    def step(w, x):
        y = x * w
        for _ in range(10):
            y = jnp.sin(y) + x
        return w - jnp.sum(y * x, axis=1), jnp.sum(y * w, axis=1)

    args = (jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    last = [i for i, x in enumerate(graph.instructions) if x.name == "add"][-1]

    def copies(longest_chain):
        rules = FusionRules(True, True, reads_written=True, longest_chain=longest_chain)
        return len(fusion(graph, rules).computed_in[last])

    assert (copies(24), copies(16)) == (2, 1)


def test_a_convolution_reads_a_reversed_kernel_as_it_is_unless_it_has_groups():
    def step(w, x, groups):
        convolved = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups)
        return jnp.sum(convolved**2)

    def reversals(groups, reads_reversed):
        shapes = (8, 8 // groups, 3, 3), (4, 8, 6, 6)
        args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]

        def gradients(w, x):
            return jax.grad(step, argnums=(0, 1))(w, x, groups)

        graph = capture_program(gradients, args=args).graph
        rules = FusionRules(
            False, cheap_elementwise=True, reads_written=True, reads_reversed=reads_reversed
        )
        kernels = fusion(graph, rules).kernels
        return sum(graph.instructions[root].name == "reverse" for root in kernels)

    assert [reversals(1, False), reversals(1, True)] == [1, 0]
    assert [reversals(8, False), reversals(8, True)] == [1, 1]


def test_differences_from_means_may_be_computed_by_every_reader():
    def step(w, x):
        y = jnp.tanh(x @ w) + x
        centred = y - jnp.mean(y, axis=0)
        normalized = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=0))
        return jnp.tanh(normalized @ w) + y, jnp.exp(y) @ w

    square = jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=(square, square)).graph

    def written(repeats):
        rules = FusionRules(
            duplicates=True,
            cheap_elementwise=True,
            reads_written=True,
            fuses_operands=True,
            repeats_differences=repeats,
        )
        return fusion(graph, rules).kernels.keys()

    producer = {tensor: i for i, x in enumerate(graph.instructions) for tensor in x.results}
    centred = next(
        i
        for i, x in enumerate(graph.instructions)
        if x.name == "subtract" and graph.tensors[x.results[0]].shape == (64, 64)
    )
    residual = producer[graph.instructions[centred].operands[0]]
    assert written(False) & {centred, residual} == {centred, residual}
    assert written(True) & {centred, residual} == {residual}
    # As compiled for H100s: the backward pass of a ResNet50 reads results of convolutions.
    gpu = compiler_of(load("h100:4").backend).fusion_rules
    assert centred not in fusion(graph, gpu).kernels


def kernel_counts(graph, name, rules):
    """The number of kernels that compute each instruction of a name."""
    computed_in = fusion(graph, rules).computed_in
    return [len(computed_in[i]) for i, x in enumerate(graph.instructions) if x.name == name]


def test_reductions_of_a_tpu_compute_values_that_read_no_more():
    def step(w, x, y):
        z = x @ w
        # The product has two readers, so it does not compute what follows.
        one = jnp.tanh(z - z.mean(0))
        two = jnp.tanh(x + y)
        joined = jnp.concatenate([x, y], 1)
        three = jnp.tanh(joined)
        sums = one.sum(0), two.sum(0), three.sum(0), (three * joined).sum(0)
        return w - one.T @ x, w - two.T @ x, three.T @ x, sums

    square = jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=(square, square, square)).graph
    rules = compiler_of(load("tpu-v5e:4").backend).fusion_rules

    assert kernel_counts(graph, "tanh", rules) == [2, 1, 1]
    assert kernel_counts(graph, "tanh", replace(rules, recomputes_summed=False)) == [1, 1, 1]


def test_every_reader_on_a_tpu_computes_a_chain_over_one_value():
    """As in EfficientNet, compiled for a v5e: an activation behind a normalization is averaged over
    the positions, and multiplied. A product reads what the kernel of a sum writes."""

    def step(w, x, y):
        activation = x * jax.nn.sigmoid(x)
        gradient = y * jax.nn.sigmoid(y)
        return activation.sum(0), jnp.exp(activation), gradient.sum(0), gradient @ w

    square = jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=(square, square, square)).graph
    rules = compiler_of(load("tpu-v5e:4").backend).fusion_rules

    assert kernel_counts(graph, "multiply", rules) == [2, 1]
    assert kernel_counts(graph, "multiply", replace(rules, recomputes_summed=False)) == [1, 1]


def test_the_gradient_of_a_concatenation_is_written_on_a_tpu():
    """As in DenseNet121, compiled for a v5e: layers read slices of the gradient of all features."""

    def step(w, x, y):
        def loss(w, y):
            joined = jnp.concatenate([jnp.tanh(x @ w), y], 1)
            return (jnp.exp(joined) * joined).sum()

        gradients = jax.grad(loss, (0, 1))(w, y)
        return w - gradients[0], y - gradients[1]

    square = jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=(square, square, square)).graph
    (operand,) = {x.operands[0] for x in graph.instructions if x.name == "slice"}
    gradient = producers(graph)[operand]
    rules = compiler_of(load("tpu-v5e:4").backend).fusion_rules
    assert fusion(graph, rules).computed_in[gradient] == (gradient,)
    others = replace(rules, writes_sums=False)
    assert len(fusion(graph, others).computed_in[gradient]) > 1


def test_residual_sums_may_be_written_for_products_that_could_compute_them():
    def step(w, x):
        y = jnp.tanh(x @ w) + x
        return y @ w, jnp.exp(y) @ w

    square = jax.ShapeDtypeStruct((64, 64), "float32")
    graph = capture_program(step, args=(square, square)).graph
    (residual,) = (i for i, x in enumerate(graph.instructions) if x.name == "add")

    def is_written(writes_sums):
        rules = FusionRules(True, True, True, fuses_operands=True, writes_sums=writes_sums)
        return residual in fusion(graph, rules).kernels

    assert not is_written(False)
    assert is_written(True)


def test_a_product_writes_what_several_kernels_read_of_its_result():
    """The backward pass of dropout: the masked gradient is read by a sum and by two products."""

    def step(w, x, bits):
        masked = jnp.where(bits > 1, x @ w, 0.0)
        return w - (masked @ x), masked.max(1), masked.T @ x

    shape = (64, 64)
    args = [jax.ShapeDtypeStruct(shape, "float32")] * 2 + [jax.ShapeDtypeStruct(shape, "uint32")]
    graph = capture_program(step, args=tuple(args)).graph
    select = next(i for i, x in enumerate(graph.instructions) if x.name == "select")
    product = next(x.results[0] for x in graph.instructions if x.name == "dot_general")
    rules = compiler_of(load("tpu-v5e:4").backend).fusion_rules

    def kernels(rules):
        return fusion(graph, rules).computed_in[select]

    assert len(kernels(rules)) == 1
    assert len(kernels(replace(rules, writes_after_products=False))) == 3
    assert product in unwritten_products(graph, fusion(graph, rules))


def is_computed_by_readers(name, step, machine):
    """Whether the first instruction of a name in a step is no kernel of its own on a machine."""
    args = (jax.ShapeDtypeStruct((64, 64), "float32"), jax.ShapeDtypeStruct((64, 64), "float32"))
    graph = capture_program(step, args=args).graph
    root = next(i for i, x in enumerate(graph.instructions) if x.name == name)
    return root not in fusion(graph, compiler_of(load(machine).backend).fusion_rules).kernels


def test_readers_compute_the_concatenation_of_a_tpu():
    def step(w, x):
        joined = jnp.concatenate([x, w], axis=1)
        return w - joined[:, :64], joined @ joined.T

    assert is_computed_by_readers("concatenate", step, "tpu-v5e:4")
    assert not is_computed_by_readers("concatenate", step, "h100:4")


def test_readers_on_a_gpu_compute_a_concatenation_that_none_needs_in_memory():
    """As in a batch normalization behind it: its sums and its elementwise readers join the parts."""

    def step(w, x):
        joined = jnp.concatenate([w, x], axis=1)
        return w - 1.0, jnp.sum(joined, axis=0), jnp.sum(joined * joined, axis=0), jnp.exp(joined)

    args = (jax.ShapeDtypeStruct((64, 16), "float32"), jax.ShapeDtypeStruct((64, 32), "float32"))
    graph = capture_program(step, args=args).graph
    root = next(i for i, x in enumerate(graph.instructions) if x.name == "concatenate")
    rules = compiler_of(load("h100:4").backend).fusion_rules
    fused = fusion(graph, rules)
    assert root not in fused.kernels
    assert len(fused.computed_in[root]) == 3
    assert root in fusion(graph, replace(rules, repeats_concatenations=False)).kernels


def test_pooling_on_a_gpu_computes_its_operand():
    def step(w, x):
        pooled = jax.lax.reduce_window(x * w, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID")
        return w - 1.0, pooled

    assert is_computed_by_readers("multiply", step, "h100:4")
    assert not is_computed_by_readers("multiply", step, "tpu-v5e:4")
