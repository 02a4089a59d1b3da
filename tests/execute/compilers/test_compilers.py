"""Compilers of machines that are not here: targets, requests, results, and every refusal.

XLA:CPU is always there. The tests of XLA:TPU and XLA:GPU run where these are installed.
"""

import dataclasses
import gzip
import importlib.util
import json
import sys
import zlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partita
from partita.capture.jax_functions import Leaf, capture_step
from partita.capture.targets import CaptureTarget
from partita.errors import CompilerError, MemoryBudgetError, PlanError
from partita.execute.compilers import compiled_plan, run
from partita.execute.compilers.compiled_plan import compile_captured
from partita.execute.compilers.cuda import CARDS, CudaCompiler, card_of, config_of
from partita.execute.compilers.family import COMPILERS, program_compiler
from partita.execute.compilers.request import CompileRequest, request_of
from partita.execute.compilers.run import abort_reason, compile_program
from partita.execute.compilers.tpu import TpuCompiler
from partita.files.checksums import with_checksum
from partita.machine import host, load
from partita.planning import plan_that_compiles
from partita.plans.baselines import BASELINES
from partita.search.find import mesh_of

WIDTH, BATCH = 256, 32
BESIDE = Path(sys.prefix) / "compilers"
"""Where `make test` installs libtpu."""


def captured(target="cpu"):
    """A dense layer with its gradient step, and a random key that it only passes on."""

    def step(state, data):
        weights, key = state
        loss, slope = jax.value_and_grad(lambda w: (jnp.tanh(data @ w) ** 2).mean())(weights)
        return {"loss": loss}, (weights - slope, jax.random.split(key)[0])

    shape = jax.ShapeDtypeStruct
    key = jax.eval_shape(lambda: jax.random.key(0))
    return capture_step(
        step,
        (shape((WIDTH, WIDTH), "float32"), key),
        shape((BATCH, WIDTH), "float32"),
        [Leaf("w", "parameter"), Leaf("key", "state")],
        batch_size=BATCH,
        target=CaptureTarget.of(target),
    )


def planned(name, machine):
    step = captured(machine.target)
    return step, BASELINES[name](step.graph, machine.name, mesh_of(machine))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def beside(monkeypatch):
    """Compilers installed beside the environment are found. Inside it, libtpu would print into
    every process with JAX."""
    jax.devices()
    monkeypatch.syspath_prepend(str(BESIDE))
    monkeypatch.setenv("PYTHONPATH", str(BESIDE))


# ------------------------------------------------------------------------------------ compilations


def test_a_plan_compiles_for_a_cpu_and_stays_in_the_cache(cache, monkeypatch):
    machine = host(4, 4 << 30)
    step, plan = planned("data parallel", machine)
    compiled = partita.compile_for(plan, step, machine=machine)
    (traffic,) = compiled.traffic
    gradient_and_loss = WIDTH * WIDTH * 4 + 4
    assert (traffic.kind, traffic.planned, traffic.emitted) == (
        "all_reduce",
        gradient_and_loss,
        gradient_and_loss,
    )
    products = 2 * 2 * (BATCH // 4) * WIDTH * WIDTH
    assert compiled.product_flops == products
    assert compiled.flops == pytest.approx(compiled.planned_flops, rel=0.03)
    assert compiled.memory.aliased >= WIDTH * WIDTH * 4  # the new weights take the place of the old
    assert compiled.fits and json.loads(json.dumps(compiled.to_json()))["fits"] is True
    assert "all-reduce: 256 KiB planned, 256 KiB" in str(compiled)

    def no_child(*arguments):
        raise AssertionError("it was compiled before")

    read_bytes = run.read_bytes
    files = []

    def noted(path, *arguments):
        files.append(path.name)
        return read_bytes(path, *arguments)

    monkeypatch.setattr(run, "_run_child", no_child)
    monkeypatch.setattr(run, "read_bytes", noted)
    assert partita.compile_for(plan, step, machine=machine) == compiled
    assert files == ["program.hlo.gz"]  # once


def test_a_baseline_is_compiled_by_its_name(cache):
    machine = host(4, 4 << 30)
    step, plan = planned("data parallel", machine)
    assert partita.compile_for("dp", step, machine=machine) == partita.compile_for(
        plan, step, machine=machine
    )
    with pytest.raises(PlanError, match="The plan 'dp' names no machine: give one"):
        partita.compile_for("dp", step)


def test_a_damaged_program_in_the_cache_is_compiled_again(cache, monkeypatch):
    machine = host(2, 4 << 30)
    step, plan = planned("data parallel", machine)
    hlo = (
        "HloModule m\n\nENTRY %main.1 (p: f32[1]) -> f32[1] {\n  ROOT %p = f32[1] parameter(0)\n}\n"
    )
    packed = gzip.compress(hlo.encode() * 100)
    memory = {"arguments": 5, "outputs": 4, "temporaries": 1, "aliased": 0, "code": 0}
    fields = {"seconds": 1.0, "memory": memory, "text": zlib.crc32(packed)}
    result = json.dumps(with_checksum(fields)).encode()
    children = []

    def child(folders, *arguments):
        children.append(len(folders))
        (folders[0] / "result.json").write_bytes(result)
        (folders[0] / "program.hlo.gz").write_bytes(packed)

    monkeypatch.setattr(run, "_run_child", child)
    compiled = partita.compile_for(plan, step, machine=machine)
    assert compiled.memory.peak == 10
    (folder,) = (cache / "compiled").iterdir()
    damages = [
        ("program.hlo.gz", b""),
        ("program.hlo.gz", packed[:-10]),
        ("result.json", result.replace(b"outputs", b"outpits")),
        ("result.json", result.replace(b'"arguments": 5', b'"arguments": 6')),
        ("result.json", b'{"error": "caf\xe9"}'),
        ("result.json", b"[" * 100_000),
    ]
    for name, content in damages:
        (folder / name).write_bytes(content)
        assert partita.compile_for(plan, step, machine=machine) == compiled
    assert children == [1] * (1 + len(damages))
    partita.compile_for(plan, step, machine=machine)
    assert len(children) == 1 + len(damages)


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PARTITA_CACHE", str(blocked))
    machine = host(2, 4 << 30)
    step, plan = planned("ZeRO-3", machine)
    kinds = {traffic.kind for traffic in compile_captured(step, plan, machine).traffic}
    assert "all_gather" in kinds


def test_a_plan_compiles_for_a_tpu_slice(cache, beside):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: make test installs it where there is a wheel")
    machine = load("tpu-v5e:4")
    step, plan = planned("data parallel", machine)
    compiled = compile_captured(step, plan, machine)
    assert compiled.compiler == "XLA:TPU" and "libtpu" in compiled.version
    assert sum(traffic.emitted for traffic in compiled.traffic) == WIDTH * WIDTH * 4 + 4
    assert compiled.product_flops == 2 * 2 * (BATCH // 4) * WIDTH * WIDTH
    assert compiled.estimated_seconds is not None and 0 < compiled.estimated_seconds < 1e-3
    # All values are on the chip, but tables of copies are not.
    assert 0 < compiled.memory.temporaries < 1 << 20


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="XLA:GPU is not installed"
)
def test_a_plan_compiles_for_gpus(cache):
    machine = load("h100:4")
    step, plan = planned("data parallel", machine)
    compiled = compile_captured(step, plan, machine)
    assert compiled.compiler == "XLA:GPU" and "cudnn" in compiled.version
    assert sum(traffic.emitted for traffic in compiled.traffic) == WIDTH * WIDTH * 4 + 4
    assert compiled.product_flops == 2 * 2 * (BATCH // 4) * WIDTH * WIDTH
    assert compiled.estimated_seconds is None


# ----------------------------------------------------------------------------------------- targets


def test_targets_have_the_shape_of_the_machine():
    assert program_compiler(load("dgx-h100:2")).target(load("dgx-h100:2")).topology == "1x2x8"
    assert TpuCompiler().target(load("tpu-v5e:16")).topology == "v5e:4x4"
    assert TpuCompiler().target(load("tpu-v5p:8")).topology == "v5p:2x2x2"
    assert program_compiler(host(3, 1 << 30)).target(host(3, 1 << 30)).devices == 3


@pytest.mark.parametrize("name", ["v100", "a100", "h100", "h200", "b200"])
def test_a_card_is_found_by_the_name_of_its_preset(name):
    machine = load(name)
    assert card_of(machine) == CARDS[name.upper()]
    assert f"device_memory_size: {machine.memory_bytes}\n" in config_of(
        card_of(machine), machine.memory_bytes
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("k80-cluster", "There is no compiler any more for 'NVIDIA K80 GPU"),
        ("p100-cluster", "There is no compiler any more for 'NVIDIA P100"),
        ("tpu-v5e:12", r"no slice of 12 TPU v5e chips to compile for\. Use one of 1, 4, 8, 16"),
    ],
)
def test_a_machine_without_a_compiler_is_one_sentence(name, sentence):
    with pytest.raises(CompilerError, match=sentence):
        program_compiler(load(name)).target(load(name))


def test_a_machine_of_an_unknown_platform_is_one_sentence():
    machine = load("h100:2")
    unknown = dataclasses.replace(
        machine, backend=dataclasses.replace(machine.backend, platform="")
    )
    with pytest.raises(CompilerError, match="There is no compiler for 'NVIDIA H100 SXM 80 GB'"):
        program_compiler(unknown)


# ---------------------------------------------------------------------------------------- refusals


def test_a_compiler_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerError, match=r"XLA:TPU is not installed: pip install 'partita\[co"):
        COMPILERS["tpu"].check()
    with pytest.raises(CompilerError, match=r"XLA:GPU is not installed: .*\[compile-gpu\]'"):
        COMPILERS["cuda"].check()


def test_a_compiler_of_another_jax_names_both_versions(monkeypatch):
    versions = {"jax-cuda13-plugin": "0.9.1", "jaxlib": "0.10.2"}
    monkeypatch.setattr("partita.execute.compilers.cuda.version", versions.__getitem__)
    with pytest.raises(CompilerError, match=r"of JAX 0\.9\.1 and JAX is 0\.10\.2: pip install jax"):
        CudaCompiler().check()


def test_a_failure_of_another_libtpu_names_both_versions(monkeypatch):
    module = "partita.execute.compilers.tpu"
    versions = {"libtpu": "0.0.30", "jax": "0.10.2"}
    monkeypatch.setattr(f"{module}.version", versions.__getitem__)
    monkeypatch.setattr(f"{module}.requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    assert str(run._refusal(COMPILERS["tpu"], "INTERNAL: no such symbol\ntrace")) == (
        "XLA:TPU does not compile the program: INTERNAL: no such symbol. libtpu is 0.0.30 and JAX "
        "0.10.2 asks for 0.0.42.*: pip install 'libtpu==0.0.42.*'."
    )
    versions["libtpu"] = "0.0.42.1"
    assert COMPILERS["tpu"].version_problem() == ""


def test_a_failure_of_a_libtpu_without_a_version_says_how_to_install_it(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("partita.execute.compilers.tpu.version", version)
    assert str(run._refusal(COMPILERS["tpu"], "INTERNAL: no such symbol")).endswith(
        "The installed libtpu states no version: pip install 'partita[compile-tpu]'."
    )


def test_an_abort_says_the_reason_of_the_compiler():
    log = (
        "I0000 loading\nF1128 08:20:01.1 55 scheduler.cc:12] Check failed: a == b\n*** trace ***\n"
    )
    assert abort_reason(log) == "Check failed: a == b"
    assert (
        abort_reason("Traceback:\n  File x\nRuntimeError: no memory\n") == "RuntimeError: no memory"
    )
    assert abort_reason("") == "it wrote no reason"


def test_a_broken_program_is_one_sentence(cache):
    machine = host(2, 4 << 30)
    step, plan = planned("data parallel", machine)
    request = request_of(step, plan, program_compiler(machine).target(machine))
    with pytest.raises(CompilerError, match="^XLA:CPU does not compile the program: "):
        compile_program(dataclasses.replace(request, program=b"nothing"))


@pytest.mark.parametrize(
    "reason",
    [
        "in memory space hbm. Used 24.00G of 15.75G hbm.",
        "on HBM, the total memory required for HLO temporaries (24.00G) exceeds available HBM "
        "(15.75G).",
    ],
)
def test_a_tpu_program_that_is_too_large_says_how_much_it_needs(reason):
    error = f"RESOURCE_EXHAUSTED: Ran out of memory {reason}"
    assert TpuCompiler().needed_bytes(error) == 24 << 30
    assert TpuCompiler().needed_bytes("INTERNAL: something else") is None


def test_temporaries_of_a_tpu_are_those_allocated_in_main_memory(tmp_path):
    assignment = (
        "BufferAssignment:\n"
        "allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:\n"
        " value: <1 p @0> (size=4096,offset=0): f32[1024]{0:T(1024)}\n"
        "allocation 1: size 16896, preallocated-temp:\n"
        " value: <2 copy-start{} @0> (size=512,offset=16384): (f32[1024], f32[1024], u32[])\n"
        "allocation 2: size 8192, color 1, preallocated-temp:\n"
    )
    assert TpuCompiler().allocated_bytes(tmp_path) is None
    (tmp_path / "module.after_optimizations-buffer-assignment.txt").write_text(assignment)
    assert TpuCompiler().allocated_bytes(tmp_path) == 16896


def test_a_request_is_read_as_it_was_written(tmp_path):
    machine = host(2, 4 << 30)
    step, plan = planned("ZeRO-3", machine)
    request = request_of(step, plan, program_compiler(machine).target(machine))
    request.write(tmp_path)
    again = CompileRequest.read(tmp_path)
    assert again.digest("1", "") == request.digest("1", "") != request.digest("2", "")


def test_a_step_at_another_line_of_its_script_has_the_same_request():
    machine = host(2, 4 << 30)
    target = program_compiler(machine).target(machine)
    shape = jax.ShapeDtypeStruct
    programs = []
    for lines_before, factor in [(1, 1), (30, 1), (1, 2)]:
        scope = {}
        text = "\n" * lines_before + f"def step(w, x):\n  return {{'loss': x[0]}}, w * {factor} + x"
        exec(compile(text, "script.py", "exec"), scope)
        arrays = shape((4,), "float32"), shape((4,), "float32")
        step = capture_step(scope["step"], *arrays, [Leaf("w", "parameter")], batch_size=4)
        plan = BASELINES["data parallel"](step.graph, machine.name, mesh_of(machine))
        programs.append(request_of(step, plan, target).program)
    assert programs[0] == programs[1] != programs[2]


# ----------------------------------------------------------------------------------- planned again


def test_a_plan_that_does_not_fit_is_planned_again(cache, monkeypatch):
    """The search gets the compiler's memory over the predicted one, and one sentence says so."""
    machine = host(4, 4 << 30)
    step, plan = planned("data parallel", machine)
    real = compiled_plan.compile_captured
    sentences = []

    def tight(step, plan, machine):
        compiled = real(step, plan, machine)
        if plan.name == "data parallel":
            memory = dataclasses.replace(compiled.memory, temporaries=2 << 30)
            return dataclasses.replace(compiled, memory=memory)
        return compiled

    monkeypatch.setattr(compiled_plan, "compile_captured", tight)
    chosen, compiled = plan_that_compiles(
        step, machine, dataclasses.replace(plan, name="data parallel"), sentences.append
    )
    assert chosen.name != "data parallel" and compiled.fits
    (sentence,) = sentences
    assert sentence.startswith("The plan 'data parallel' needs 2.0 GiB of memory on every device")
    assert sentence.endswith("Planned again within that limit.")


def test_a_plan_that_never_fits_is_refused(cache, monkeypatch):
    machine = host(2, 4 << 30)
    step, plan = planned("data parallel", machine)

    def never(step, plan, machine):
        raise MemoryBudgetError("too large. Use less.", 1.01)

    monkeypatch.setattr(compiled_plan, "compile_captured", never)
    sentences = []
    with pytest.raises(MemoryBudgetError, match="too large"):
        plan_that_compiles(step, machine, plan, sentences.append)
    assert len(sentences) == 3


def test_the_pieces_of_a_plan_compile_in_one_process(cache, monkeypatch):
    """Two microbatches: forward and backward run twice, the gradient's sum and the update once."""
    machine = host(4, 4 << 30)
    step, plan = planned("data parallel", machine)
    processes = []
    real = run._run_child

    def counted(folders, *arguments):
        processes.append(len(folders))
        real(folders, *arguments)

    monkeypatch.setattr(run, "_run_child", counted)
    compiled = partita.compile_for(dataclasses.replace(plan, microbatches=2), step, machine=machine)
    assert processes == [4]
    (traffic,) = compiled.traffic
    gradient_and_losses = WIDTH * WIDTH * 4 + 2 * 4
    assert traffic.planned == traffic.emitted == gradient_and_losses
    assert compiled.product_flops == 2 * 2 * (BATCH // 4) * WIDTH * WIDTH
    ((planned_bytes, compiled_bytes),) = compiled.groups
    assert compiled_bytes == compiled.memory.peak > 2 * WIDTH * WIDTH * 4
    assert planned_bytes == compiled.planned_peak_bytes
    assert "device group 0: " in str(compiled)


def test_random_keys_are_compiled_as_their_data():
    machine = host(2, 4 << 30)
    step, plan = planned("data parallel", machine)
    request = request_of(step, plan, program_compiler(machine).target(machine))
    assert request.inputs[1] == ([2], "uint32")
    assert np.dtype(request.inputs[0][1]) == np.float32
