"""Collectives in the texts of compiled programs. The texts were written by XLA:GPU for H100s and by
XLA:TPU for a v5e, and are shortened to the instructions that count.
"""

from partita.execute.emitted import emitted

GPU = """
HloModule jit_call, is_scheduled=true

ENTRY %main.1 (param: f32[16], param.1: f32[64,128]) -> f32[128] {
  %copy.1 = f32[16]{0} copy(%param), metadata={op_name="jit(call)/call_exported/dense/bias/reshard"}
  %copy.2 = f32[64,128]{1,0} copy(%param.1), metadata={op_name="jit(call)/call_exported/dense/kernel/reshard"}
  %all-gather-start = ((f32[16]{0}, f32[64,128]{1,0}), (f32[128]{0}, f32[512,128]{1,0})) all-gather-start(%copy.1, %copy.2), channel_id=1, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = (f32[128]{0}, f32[512,128]{1,0}) all-gather-done(%all-gather-start)
  %all-gather-start.1 = (bf16[128,512]{1,0}, bf16[512,512]{1,0}) all-gather-start(%param.2), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-reduce-start = f32[2]{0} all-reduce-start(%wrapped_concatenate), channel_id=52, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%region_22.0.clone
  %all-reduce-done = f32[2]{0} all-reduce-done(%all-reduce-start)
  %reduce-scatter-start = ((f32[512,128]{1,0}, f32[128]{0}), (f32[64,128]{1,0}, f32[16]{0})) reduce-scatter-start(%fusion.1, %fusion.2), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%add
  %reduce-scatter-done = (f32[64,128]{1,0}, f32[16]{0}) reduce-scatter-done(%reduce-scatter-start)
  ROOT %copy.9 = f32[128]{0} copy(%get-tuple-element.1)
}
"""
FUSED_TPU = """
HloModule jit_call, is_scheduled=true

%fused_computation.122 (param_0.280: bf16[16,64]) -> (bf16[16,64], bf16[128,64]) {
  %param_0.280 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.42 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%param_0.280), channel_id=4, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="1"}, metadata={op_name="jit(call)/call_exported/dense/kernel/reshard"}
}

%async_collective_fusion.77 (param_0.284: bf16[16,64]) -> bf16[128,64] {
  %param_0.284 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.44 = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.284), channel_id=4, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.3 (input_0: f32[4096,64], input_1: f32[128,64]) -> (f32[512,64], f32[16,64]) {
  %input_0 = f32[4096,64]{0,1:T(8,128)S(1)} parameter(0)
  %input_1 = f32[128,64]{1,0:T(8,128)S(1)} parameter(1)
  %all-reduce.21 = (f32[4096,64]{0,1:T(8,128)}, f32[128,64]{1,0:T(8,128)}) all-reduce(%input_0, %input_1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%region_10.0.clone.1.clone
}

ENTRY %main.1 (param: bf16[16,64]) -> bf16[128,64] {
  %async-collective-start.1 = (bf16[16,64]{1,0:T(8,128)(2,1)S(1)}, bf16[128,64]{1,0:T(8,128)(2,1)S(1)}) fusion(%convert.10), kind=kCustom, calls=%fused_computation.122
  %fusion.77 = (bf16[16,64]{1,0:T(8,128)(2,1)S(1)}, bf16[128,64]{1,0:T(8,128)(2,1)S(1)}) fusion(%get-tuple-element.211), kind=kOutput, calls=%async_collective_fusion.77
  %copy.45 = f32[4096,64]{0,1:T(8,128)S(1)} copy(%param.1), metadata={op_name="jit(call)/call_exported/user/embeddings/reshard"}
  ROOT %fusion.44 = (f32[512,64]{0,1:T(8,128)S(1)}, f32[16,64]{1,0:T(8,128)S(1)}) fusion(%copy.45, %fusion.18), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="jit(call)/call_exported/item/scatter-add"}
}
"""
TPU_LOOP = """
HloModule jit_call, is_scheduled=true

%wide.region_1.0_spmd.clone (wide.param.31: (s32[], f32[4,64])) -> pred[] {
  %constant.114.clone.2 = s32[]{:T(128)} constant(32)
  %wide.param.31 = (s32[]{:T(128)}, f32[4,64]{1,0:T(4,128)S(1)}) parameter(0)
  %get-tuple-element.613 = s32[]{:T(128)} get-tuple-element(%wide.param.31), index=4
  ROOT %lt.25 = pred[]{:T(512)} compare(%get-tuple-element.613, %constant.114.clone.2), direction=LT
}

%wide.region_0.0_spmd.clone.sunk (param: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %all-reduce.5 = f32[4,64]{1,0:T(4,128)S(1)} all-reduce(%fusion.9), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true, to_apply=%add
}

ENTRY %main.1 (param: f32[4,64]) -> f32[4,64] {
  %while.200 = (s32[]{:T(128)}, f32[4,64]{1,0:T(4,128)S(1)}) while(%tuple.98), condition=%wide.region_1.0_spmd.clone, body=%wide.region_0.0_spmd.clone.sunk, metadata={op_name="jit(call)/jvp(lstm)/while"}
  %while.201 = (s32[], f32[4,64]) while(%tuple.97), condition=%c, body=%wide.region_0.0_spmd.clone.sunk, backend_config={"known_trip_count":{"n":"3"}}
}
"""
BRANCHES = """
HloModule jit_call, is_scheduled=true

%region_0.0_spmd (param.1: f32[64,2048]) -> f32[] {
  %all-gather = f32[256,2048]{1,0} all-gather(%param.1), channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, use_global_device_ids=true
}

%region_1.0_spmd (param.2: f32[64,2048]) -> f32[] {
  %all-reduce = f32[]{:T(128)} all-reduce(%reduce.1), channel_id=2, replica_groups=mesh['axis_0'=4] {'axis_0'}, use_global_device_ids=true, to_apply=%add
}

ENTRY %main.1 (param: f32[64,2048]) -> f32[] {
  %conditional = f32[] conditional(%convert, %param, %param), branch_computations={%region_0.0_spmd, %region_1.0_spmd}
}
"""


def brief(text):
    return [(e.kind, e.nbytes, e.group, e.trips, e.path) for e in emitted(text)]


def test_an_asynchronous_gather_counts_its_results():
    gathers = [row for row in brief(GPU) if row[0] == "all_gather"]
    assert gathers == [
        ("all_gather", 128 * 4, 8, 1, "dense/bias"),
        ("all_gather", 512 * 128 * 4, 8, 1, "dense/kernel"),
        ("all_gather", 512 * 512 * 2, 4, 1, ""),
    ]


def test_asynchronous_sums_count_their_operands():
    others = [row for row in brief(GPU) if row[0] != "all_gather"]
    assert others == [
        ("all_reduce", 8, 8, 1, ""),
        ("reduce_scatter", 512 * 128 * 4, 8, 1, ""),
        ("reduce_scatter", 128 * 4, 8, 1, ""),
    ]


def test_a_gather_in_the_fusions_beside_it_counts_once():
    gathers = [row for row in brief(FUSED_TPU) if row[0] == "all_gather"]
    assert gathers == [("all_gather", 128 * 64 * 2, 8, 1, "dense/kernel")]


def test_a_fusion_of_a_sum_and_a_slice_is_a_reduce_scatter():
    sums = [row for row in brief(FUSED_TPU) if row[0] != "all_gather"]
    assert sums == [
        ("reduce_scatter", 4096 * 64 * 4, 8, 1, "user/embeddings"),
        ("reduce_scatter", 128 * 64 * 4, 8, 1, "item"),
    ]


def test_trips_are_read_from_the_loop_or_from_its_condition():
    assert [row[3] for row in brief(TPU_LOOP)] == [32, 3]


def test_collectives_of_all_branches_of_a_conditional_count():
    assert brief(BRANCHES) == [
        ("all_gather", 256 * 2048 * 4, 4, 1, ""),
        ("all_reduce", 4, 4, 1, ""),
    ]
