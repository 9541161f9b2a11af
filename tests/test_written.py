"""Bytes written by a program, read from a text: loops, updates in place, on-chip results, workspaces, branches."""

from dspark_jax.planning.rounds import LoopText
from dspark_jax.planning.written import Writer, together, writers

TEXT = """\
HloModule step

%fused_update (p0: f32[8,4], p1: f32[1,4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[8,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]) parameter(0)
  %held = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %row = f32[1,4]{1,0} custom-call(%held), metadata={op_name="jit(step)/scan/dot_general"}
  %in_place = f32[8,4]{1,0} fusion(%held, %row), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[8,4]) tuple(%n, %in_place)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %near = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%convert
  %product = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%x, %near), custom_call_target="__cublas$gemm"
  %loop = (s32[], f32[8,4]) while(%start), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %ahead = ((f32[8,4]{1,0}), f32[2,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:4]}
  %sum-start = f32[8,4]{1,0} all-reduce-start(%x), to_apply=%add
  %sum-done = f32[8,4]{1,0} all-reduce-done(%sum-start)
  ROOT %out = f32[8,4]{1,0} copy(%sum-done)
}
"""


def test_what_a_program_writes() -> None:
    found = writers(LoopText.of(TEXT, 0))
    whole, row = 8 * 4 * 4, 4 * 4
    # A product without its workspace, five rows and five updates of one row each, a sum over devices, a copy.
    assert together(found) == whole + 5 * row + 5 * row + whole + whole
    assert Writer(5 * row, 5, "f32[1,4]", "jit(step)/scan/dot_general") in found
    assert found[0].size == whole


def test_a_loops_length_may_stand_in_its_condition() -> None:
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %y = f32[8]{0} negate(%x)
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%p), condition=%condition, body=%body
}
"""
    assert together(writers(LoopText.of(text, 0))) == 5 * 8 * 4
