"""The estimate of a program's time, on a text whose figures are worked out by hand."""

import pytest

from pdrop_jax.analysis.chips import CHIPS
from pdrop_jax.planner.estimate import Time, estimate
from pdrop_jax.planner.hlo_text import Shape, parse
from pdrop_jax.planner.traffic import hbm_bytes, products

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1500000"}}'  # a millisecond on a v5e
NORM = 'metadata={op_name="jit(f)/while/body/norm/mul"}'
KERNEL = (
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,4,416,128]{3,2,1,0}, '
    'bf16[2,4,512,128]{3,2,1,0}}, metadata={op_name="jit(f)/attention/kernel"}'
)
TEXT = (
    (
        """HloModule step
%product (x: bf16[64,128], w: bf16[4,128,256]) -> bf16[64,256] {
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %n.1 = s32[] constant(0)
  %w.2 = bf16[1,128,256]{2,1,0} dynamic-slice(%w.1, %n.1, %n.1, %n.1), dynamic_slice_sizes={1,128,256}
  %w.3 = bf16[128,256]{1,0} bitcast(%w.2)
  ROOT %y.1 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%x.1, %w.3), dim_labels=bf_io->bf, NORM
}
%write (cache: bf16[4,8,128], token: bf16[1,8,128]) -> bf16[4,8,128] {
  %cache.1 = bf16[4,8,128]{2,1,0} parameter(0)
  %token.1 = bf16[1,8,128]{2,1,0} parameter(1)
  %n.2 = s32[] constant(1)
  ROOT %new.1 = bf16[4,8,128]{2,1,0} dynamic-update-slice(%cache.1, %token.1, %n.2, %n.2, %n.2)
}
%all-reduce-scatter (partial: bf16[64,128]) -> bf16[16,128] {
  %partial = bf16[64,128]{1,0} parameter(0)
  %whole = bf16[64,128]{1,0} all-reduce(%partial), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %share = bf16[16,128]{1,0} slice(%whole), slice={[0:16], [0:128]}
}
%more (carry: (s32[], bf16[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%n, %limit), direction=LT
}
%layer (carry: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %carry = (s32[], bf16[64,128]{1,0}) parameter(0)
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %w = bf16[4,128,256]{2,1,0} get-tuple-element(%carry), index=2
  %y = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%product, CYCLES
  %gathered = bf16[16,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %moved = (bf16[16,128]{1,0}, bf16[16,128]{1,0}) collective-permute-start(%x), channel_id=2
  %z = bf16[64,128]{1,0} add(%x, %x), metadata={op_name="jit(f)/transpose(jvp(drop))/attention/add"}, CYCLES
  %k = bf16[64,128]{1,0} copy(%z), CYCLES
  %pieces = (u32[], bf16[64,128]{1,0}) while(%carry), condition=%more_pieces, body=%piece
}
%more_pieces (carry.2: (u32[], bf16[64,128])) -> pred[] {
  %carry.2 = (u32[], bf16[64,128]{1,0}) parameter(0)
  %n.3 = u32[] get-tuple-element(%carry.2), index=0
  %limit.1 = u32[] constant(8)
  ROOT %less.1 = pred[] compare(%n.3, %limit.1), direction=LT
}
%piece (carry.3: (u32[], bf16[64,128])) -> (u32[], bf16[64,128]) {
  %carry.3 = (u32[], bf16[64,128]{1,0}) parameter(0)
  %n.4 = u32[] get-tuple-element(%carry.3), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%n.4, %two)
  %x.2 = bf16[64,128]{1,0} get-tuple-element(%carry.3), index=1
  %piece.1 = bf16[64,128]{1,0} multiply(%x.2, %x.2), metadata={op_name="jit(f)/head/mul"}, CYCLES
  ROOT %carry.4 = (u32[], bf16[64,128]{1,0}) tuple(%next, %piece.1)
}
ENTRY %main (q: bf16[64,128]) -> bf16[64,128] {
  %q = bf16[64,128]{1,0} parameter(0)
  %c = bf16[4,8,128]{2,1,0} parameter(1)
  %t = bf16[1,8,128]{2,1,0} parameter(2)
  %layers = (s32[], bf16[64,128]{1,0}) while(%q), condition=%more, body=%layer
  %new = bf16[4,8,128]{2,1,0} fusion(%c, %t), kind=kLoop, calls=%write, CYCLES
  %splash_mha_fwd_residuals.1 = bf16[2,4,416,128]{3,2,1,0} custom-call(%q), KERNEL
  %scattered = bf16[16,128]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter
  %sum = f32[1024]{0} all-reduce(%q), channel_id=3, replica_groups=mesh['a'=2,'b'=2,'c'=4] {'a','c'}, to_apply=%add
}
"""
    )
    .replace("CYCLES", CYCLES)
    .replace("NORM", NORM)
    .replace("KERNEL", KERNEL)
)


def test_time_by_part():
    parts, v5e = estimate(parse(TEXT), "v5e").parts, CHIPS["v5e"]
    macs = 64 * 128 * 256
    attention = 2 * 2 * 4 * 416 * 128 * 512
    expected = {
        # The weight's slice and the input are read; the output stays in the chip's own memory.
        "decoder products": Time(4 * 2e3 * macs / v5e.flops, 4 * 1e3 * (64 * 128 + 128 * 256) * 2 / v5e.hbm, 4.0, 0.0),
        "drop": Time(0.0, 4 * 1e3 * 3 * 64 * 128 * 2 / v5e.hbm, 4.0, 0.0),
        "attention": Time(
            2e3 * attention / v5e.flops,
            1e3 * (2 * 4 * 416 * 128 + 64 * 128) * 2 / v5e.hbm,
            2e3 * attention / v5e.flops,
            0.0,
        ),
        "copies": Time(0.0, 4 * 1e3 * 2 * 64 * 128 * 2 / v5e.hbm, 4.0, 0.0),
        # In each of four layers, four times: the counter goes up to eight by two.
        "head": Time(0.0, 16 * 1e3 * 3 * 64 * 128 * 2 / v5e.hbm, 16.0, 0.0),
        # Written in place: the token alone is read and written. The counter is added to sixteen times.
        "other": Time(0.0, 1e3 * (2 * 8 * 128 * 2 + 16 * 3 * 4) / v5e.hbm, 1.0, 0.0),
    }
    for part, time in expected.items():
        for name in ("matrix", "memory", "cycles", "links"):
            assert getattr(parts[part], name) == pytest.approx(getattr(time, name)), (part, name)
    # In each layer three quarters of the result come over the links; a sum over eight devices sends seven eighths
    # twice, a scattered sum three quarters once; permutes run beside the products.
    sent = 4 * 3 / 4 * 16 * 128 * 2 + 2 * 7 / 8 * 1024 * 4 + 3 / 4 * 64 * 128 * 2
    assert parts["collectives"].links == pytest.approx(1e3 * sent / v5e.ici)
    assert set(parts) == {*expected, "collectives"}


PERMUTE = """%moved = (bf16[2816,11008]{1,0}, bf16[2816,11008]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=9
  """


@pytest.mark.parametrize("permute", ["", PERMUTE])
def test_collectives_beside_products_take_what_they_need_longer(permute):
    """A fusion starts a gather within a fusion of its own, and the next one carries it on; a permute may run, too."""
    text = """HloModule step
%start (w: bf16[256,11008]) -> (bf16[4096,11008], u32[]) {
  %w.1 = bf16[256,11008]{1,0} parameter(0)
  %gather.1 = bf16[4096,11008]{1,0} all-gather(%w.1), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %started = (bf16[4096,11008]{1,0}, u32[]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}
%first (x: bf16[64,128], w: bf16[256,11008]) -> (bf16[64,128], u32[]) {
  %x.1 = bf16[64,128]{1,0} parameter(0)
  %w.2 = bf16[256,11008]{1,0} parameter(1)
  ROOT %begin = (bf16[4096,11008]{1,0}, u32[]) fusion(%w.2), kind=kCustom, calls=%start
}
%second (x: bf16[64,128], w: bf16[256,11008]) -> (bf16[64,128], u32[]) {
  %w.3 = bf16[256,11008]{1,0} parameter(1)
  ROOT %gather.2 = bf16[4096,11008]{1,0} all-gather(%w.3), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
}
ENTRY %main (x: bf16[64,128], w: bf16[256,11008]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %w = bf16[256,11008]{1,0} parameter(1)
  PERMUTE%a = (bf16[64,128]{1,0}, u32[]) fusion(%x, %w), kind=kCustom, calls=%first, CYCLES
  %b = (bf16[64,128]{1,0}, u32[]) fusion(%x, %w), kind=kCustom, calls=%second, CYCLES
}
""".replace("PERMUTE", permute)
    gather = 1e3 * 15 / 16 * 4096 * 11008 * 2 / CHIPS["v5e"].ici
    moved = 1e3 * 2816 * 11008 * 2 / CHIPS["v5e"].ici if permute else 0
    for milliseconds in (0.4, 1.0):
        cycles = CYCLES.replace("1500000", str(int(1.5e6 * milliseconds)))
        time = estimate(parse(text.replace("CYCLES", cycles)), "v5e").time
        assert time.cycles == pytest.approx(2 * milliseconds)
        assert time.links == pytest.approx(max(0, gather + moved - 2 * milliseconds))
    assert 0.8 < gather < 2


def test_a_kernel_of_narrow_heads_takes_as_long_and_needs_no_scope():
    narrow = TEXT.replace("416,128]{3,2,1,0}, ", "416,72]{3,2,1,0}, ").replace(
        ', metadata={op_name="jit(f)/attention/kernel"}', ""
    )
    assert narrow != TEXT
    found, expected = (estimate(parse(text), "v5e").parts["attention"] for text in (narrow, TEXT))
    assert found.matrix == expected.matrix


def test_where_the_compiler_has_no_cycles_the_memory_or_the_matrix_unit_is_at_its_peak():
    text = TEXT.replace('"estimated_cycles":"1500000"', f'"estimated_cycles":"{2**63 - 1}"')
    known, unknown = (estimate(parse(x), "v5e").parts["decoder products"] for x in (TEXT, text))
    assert unknown.cycles == max(known.matrix, known.memory) > 0


def test_what_the_compiler_keeps_on_the_chip_is_no_traffic():
    module = parse(TEXT)
    layer = module.computations["layer"]
    assert layer.instructions["y"].shapes == (Shape("bf16", (64, 256), in_hbm=False),)
    assert hbm_bytes(module, layer, layer.instructions["y"]) == (64 * 128 + 128 * 256) * 2


def test_a_layer_of_int8_weights_is_read_as_a_layer_of_int8():
    """The compiler retiles the stack without moving it, and slices and scales it in a fusion of its own."""
    module = parse("""HloModule decode
%retile (w: s8[8,128,256]) -> s8[8,128,256] {
  %w.1 = s8[8,128,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %w.2 = s8[8,128,256]{2,1,0:T(8,128)(4,1)} copy(%w.1)
}
%scale (n: s32[], w: s8[8,128,256]) -> bf16[1,128,256] {
  %n.1 = s32[] parameter(0)
  %w.3 = s8[8,128,256]{2,1,0:T(32,128)(4,1)} parameter(1)
  %w.4 = s8[8,128,256]{2,1,0} fusion(%w.3), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  %w.5 = s8[1,128,256]{2,1,0} dynamic-slice(%w.4, %n.1, %n.1, %n.1), dynamic_slice_sizes={1,128,256}
  ROOT %w.6 = bf16[1,128,256]{2,1,0} convert(%w.5)
}
%product (x: bf16[8,128], n: s32[], w: s8[8,128,256]) -> bf16[8,256] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %n.2 = s32[] parameter(1)
  %w.7 = s8[8,128,256]{2,1,0} parameter(2)
  %w.8 = bf16[1,128,256]{2,1,0} fusion(%n.2, %w.7), kind=kLoop, calls=%scale
  %w.9 = bf16[128,256]{1,0} bitcast(%w.8)
  ROOT %y.1 = bf16[8,256]{1,0} convolution(%x.1, %w.9), dim_labels=bf_io->bf
}
ENTRY %main (x: bf16[8,128], n: s32[], w: s8[8,128,256]) -> bf16[8,256] {
  %x = bf16[8,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = s8[8,128,256]{2,1,0} parameter(2)
  ROOT %y = bf16[8,256]{1,0} fusion(%x, %n, %w), kind=kOutput, calls=%product
}
""")
    main = module.computations[""]
    assert hbm_bytes(module, main, main.instructions["y"]) == 8 * 128 * 2 + 4 + 128 * 256 + 8 * 256 * 2


@pytest.mark.parametrize(
    ("instruction", "macs"),
    [
        # A batched product as the TPU compiler writes it: the batch is a dimension of the window, spread by dilation.
        (
            "convolution(%l, %r), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            8 * 16 * 32 * 64,
        ),
        ("dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}", 8 * 16 * 32 * 64),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "s8"])
def test_products_without_those_on_padding(instruction, macs, dtype):
    text = f"""ENTRY %main (l: {dtype}[8,16,32]) -> f32[8,16,64] {{
  %l = {dtype}[8,16,32]{{2,1,0}} parameter(0)
  %r = {dtype}[8,32,64]{{2,1,0}} parameter(1)
  %o = f32[8,16,64]{{2,1,0}} {instruction}
}}
"""
    module = parse(text)
    found = products(module, module.computations[""], module.computations[""].instructions["o"])
    assert found == ((0, macs) if dtype == "s8" else (macs, 0))


@pytest.mark.parametrize(
    "branches", ["branch_computations={%few, %most, %none}", "true_computation=%few, false_computation=%most"]
)
def test_of_a_conditional_the_branch_that_writes_most_counts(branches):
    """Each is given the whole cache, and names it; what counts is what it computes."""
    text = """HloModule step
%few (cache: f32[64,128]) -> f32[64,8] {
  %cache.1 = f32[64,128]{1,0} parameter(0)
  %same = f32[64,128]{1,0} bitcast(%cache.1)
  ROOT %logits.1 = f32[64,8]{1,0} add(%same, %same), CYCLES
}
%most (cache: f32[64,128]) -> f32[64,16] {
  %cache.2 = f32[64,128]{1,0} parameter(0)
  ROOT %logits.2 = f32[64,16]{1,0} add(%cache.2, %cache.2), CYCLES
}
%none (cache: f32[64,128]) -> f32[64,128] {
  ROOT %cache.3 = f32[64,128]{1,0} parameter(0)
}
ENTRY %main (c: f32[64,128]) -> f32[64,16] {
  %c = f32[64,128]{1,0} parameter(0)
  %n = s32[] constant(1)
  ROOT %out = f32[64,16]{1,0} conditional(%n, %c, %c, %c), BRANCHES
}
""".replace("CYCLES", CYCLES).replace("BRANCHES", branches)
    module = parse(text)
    assert [x.name for x, *_ in module.executed() if x.opcode == "add"] == ["logits.2"]
    assert estimate(module, "v5e").time.cycles == pytest.approx(1)
