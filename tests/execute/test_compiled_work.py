"""FLOPs in the texts of compiled programs, against the formulas of their operations."""

import pytest

from partita.execute.compiled_work import work_of
from partita.execute.hlo import HloModule

HEAD = "ENTRY %main.1 (p: f32[1]) -> f32[1] {\n"


def work(*lines):
    return work_of(HloModule.of(HEAD + "\n".join(f"  {line}" for line in lines) + "\n}\n"))


CUBLAS = (
    "%a = bf16[16,1024,512]{2,1,0} parameter(0)",
    "%b = bf16[16,512,1536]{2,1,0} parameter(1)",
    '%c = (bf16[16,1024,1536]{2,1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}',
)
# A batch of 64 products in the form that XLA:TPU gives them: the batch dims are windows.
TPU_PRODUCT = (
    "%a = f32[2,64,8,16]{2,3,1,0:T(8,128)} parameter(0)",
    "%b = f32[8,64,2,16]{2,3,1,0:T(8,128)} parameter(1)",
    "%c = f32[2,8,64,64]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=0b1f_1o0i->01bf",
)
ATTENTION = (
    "%q = bf16[2,512,8,64]{3,2,1,0} parameter(0)",
    '%c = (bf16[2,8,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"algorithm": {"algo_id": "0"}, "fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "512", "512"]}, "mask_type": "NO_MASK"}}',
)


def test_a_product_of_cublas():
    assert work(*CUBLAS).product_flops == 2 * 16 * 1024 * 512 * 1536


def test_a_product_as_a_convolution_skips_the_holes():
    # 8 products of (64, 16) and (16, 64) for each of 2 samples; the kernel's batch is dilated too.
    expected = 2 * 2 * 8 * 64 * 64 * 16
    assert work(*TPU_PRODUCT).product_flops == expected


@pytest.mark.parametrize(
    ("target", "operands", "result"),
    [
        ("convForward", ("f32[4,8,8,3]", "f32[16,3,3,3]"), "f32[4,8,8,16]"),
        ("convBackwardInput", ("f32[4,8,8,16]", "f32[16,3,3,3]"), "f32[4,8,8,3]"),
        ("convBackwardFilter", ("f32[4,8,8,3]", "f32[4,8,8,16]"), "f32[16,3,3,3]"),
    ],
)
def test_the_convolutions_of_a_layer_have_equal_work(target, operands, result):
    flops = work(
        f"%a = {operands[0]} parameter(0)",
        f"%b = {operands[1]} parameter(1)",
        f'%c = ({result}, u8[0]) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"',
    ).product_flops
    # 22 pairs of an output and a kernel position per dim of 8 with a window of 3.
    assert flops == 2 * 22 * 22 * 4 * 16 * 3


def test_a_window_over_a_whole_dim_is_one_sum():
    lines = (
        "%a = f32[4,24,16] parameter(0)",
        "%z = f32[] constant(0)",
        "%b = f32[4,24,16] reduce-window(%a, %z), window={size=1x1x31 pad=0_0x0_0x15_15}, to_apply=%add",
    )
    assert work(*lines).flops == 4 * 24 * 15


def test_fused_attention_has_two_products_and_five_backward():
    forward = work(*ATTENTION).product_flops
    assert forward == 2 * 2 * 2 * 8 * 512 * 512 * 64
    backward = work(*(line.replace("fmhaSoftmax", "fmhaSoftmaxBackward") for line in ATTENTION))
    assert backward.product_flops == 2.5 * forward
    causal = work(*(line.replace("NO_MASK", "CAUSAL") for line in ATTENTION))
    assert causal.product_flops == forward / 2


def test_a_recurrent_layer_of_cudnn():
    shapes = (
        "(f32[4,32,64]{2,1,0}, f32[1,4,64]{2,1,0}, f32[1,4,64]{2,1,0}, f32[33280]{0}, f32[9]{0})"
    )
    weights = "%w = f32[33280]{0} parameter(0)"
    forward = work(
        weights,
        f'%c = {shapes} custom-call(%w, %w, %w, %w), custom_call_target="cudnn_rnn_ffi"',
    ).product_flops
    # 32 steps of 4 samples; 4 gates of 64 cells read 64 inputs and 64 cells.
    assert forward == 2 * 4 * 32 * 4 * 64 * (64 + 64)
    backward = work(
        weights, f'%c = {shapes} custom-call(%w), custom_call_target="cudnn_rnn_bwd_ffi"'
    ).product_flops
    assert backward == 2 * forward


def test_loops_fusions_and_cycles():
    module = HloModule.of(
        "%f (p: f32[8]) -> f32[8] {\n"
        "  %p = f32[8]{0} parameter(0)\n"
        "  %m = f32[8]{0} multiply(%p, %p)\n"
        "  ROOT %a = f32[8]{0} add(%m, %p)\n}\n"
        "%body (p: f32[8]) -> f32[8] {\n"
        "  %p = f32[8]{0} parameter(0)\n"
        '  ROOT %g = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"70"}\n}\n'
        + HEAD
        + '  %w = f32[8]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}\n}\n'
    )
    found = work_of(module)
    assert (found.flops, found.fusions, found.cycles) == (2 * 8 * 5, 1, 350)


def test_a_collective_of_a_tpu_counts_once_and_a_reduce_scatter_not():
    async_sum = '  ROOT %s = f32[32]{0} all-reduce(%p), channel_id=2, to_apply=%add, frontend_attributes={chain_id="5"}\n}\n'
    module = HloModule.of(
        "%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {\n"
        "  %p = f32[64]{0} parameter(0)\n"
        "  %r = f32[64]{0} all-reduce(%p), channel_id=1, to_apply=%add\n}\n"
        "%start (p: f32[32]) -> f32[32] {\n  %p = f32[32]{0} parameter(0)\n"
        + async_sum
        + "%step (p: f32[32]) -> f32[32] {\n  %p = f32[32]{0} parameter(0)\n"
        + async_sum
        + HEAD
        + "  %a = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n"
        "  %b = f32[32]{0} fusion(%x), kind=kCustom, calls=%start\n"
        "  %c = f32[32]{0} fusion(%b), kind=kCustom, calls=%step\n}\n"
    )
    assert work_of(module).flops == 32
