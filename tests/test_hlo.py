"""What a compiled program costs, read off its text: programs of known cost compiled here, and lines as TPU programs have them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from llm_jax import hlo, hlo_cost


def compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_loops_inside_loops_count_by_their_trips():
    def inner(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]

    def outer(x, w):
        return lax.scan(lambda x, _: (inner(x, w), None), x, length=5)[0] @ w

    text = compiled(outer, of(64, 64), of(64, 64))
    assert hlo_cost.cost(text).flops == (5 * 3 + 1) * 2 * 64**3
    module = hlo.read(text)
    found = [hlo.trips(module, c, x) for c in module.computations.values() for x in c.values() if x.opcode == "while"]
    assert sorted(found) == [3, 5]


def test_the_gradient_of_scanned_layers():
    """Three products of a layer for each, four where the forward pass is computed again."""

    def loss(w, x, again):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(lax.scan(jax.checkpoint(layer) if again else layer, x, w)[0] ** 2)

    each = 2 * 32 * 64 * 64
    for again, products in ((False, 3), (True, 4)):
        text = compiled(jax.grad(partial(loss, again=again), argnums=(0, 1)), of(7, 64, 64), of(32, 64))
        assert hlo_cost.cost(text).flops in (7 * products * each, (7 * products - 1) * each)


def test_products_with_batch_axes():
    text = compiled(lambda a, b: jnp.einsum("bhse,bhte->bhst", a, b), of(2, 3, 16, 8), of(2, 3, 24, 8))
    assert hlo_cost.cost(text).flops == 2 * 2 * 3 * 16 * 24 * 8


@pytest.mark.parametrize(("stride", "padding", "dilated"), [(1, "SAME", 1), (2, "VALID", 1), (1, [(1, 1), (1, 2)], 2)])
def test_a_convolution_counts_the_pairs_that_meet(stride, padding, dilated):
    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), padding, lhs_dilation=(dilated,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    ones = np.asarray(conv(jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))))  # each value is the number of its terms
    line = compiled(conv, of(2, 9, 9, 3), of(3, 3, 3, 4))
    found = hlo_cost.cost(line).flops
    assert found == 2 * ones.sum() or "custom-call" in line


TPU = """HloModule m, is_scheduled=true

%begins (p0: bf16[32,128]) -> (bf16[32,128], bf16[128,128], u32[]) {
  %p0 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begin = (bf16[32,128]{1,0}, bf16[128,128]{1,0}, u32[]) custom-call(%all-gather.2), custom_call_target="AsyncCollectiveStart"
}

%ends (p1: bf16[32,128], p2: bf16[128,128]) -> bf16[128,128] {
  %p1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p2 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.3 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %end = bf16[128,128]{1,0} custom-call(%p1, %p2, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}

%all-reduce-scatter (input: bf16[128,128]) -> bf16[32,128] {
  %input = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.4 = bf16[128,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = bf16[32,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.4, %zero, %zero), dynamic_slice_sizes={32,128}
}

%body (state: (s32[], f32[2,128,4,32], s32[])) -> (s32[], f32[2,128,4,32], s32[]) {
  %state = (s32[]{:T(128)}, f32[2,128,4,32]{3,1,2,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %q = f32[2,128,4,32]{3,1,2,0:T(8,128)} get-tuple-element(%state), index=1
  %by = s32[]{:T(128)} get-tuple-element(%state), index=2
  %next = s32[]{:T(128)} add(%i, %by)
  %scores = f32[2,4,128,128]{2,3,1,0:T(8,128)} convolution(%q, %q), window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf
  %ended = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} fusion(%part, %all), kind=kCustom, calls=%ends
  %part = bf16[32,128]{1,0:T(8,128)(2,1)} copy(%of)
  %all-gather.4 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %after = (s32[]{:T(128)}, f32[2,128,4,32]{3,1,2,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %q, %by)
}

%condition (state: (s32[], f32[2,128,4,32], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[2,128,4,32]{3,1,2,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %last = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %last), direction=LT
}

ENTRY %main (w: bf16[32,128], q: f32[2,128,4,32], g: bf16[128,128]) -> bf16[32,128] {
  %w = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = f32[2,128,4,32]{3,1,2,0:T(8,128)} parameter(1)
  %g = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(2)
  %two = s32[]{:T(128)} constant(2)
  %from = s32[]{:T(128)} copy(%two)
  %before = (s32[]{:T(128)}, f32[2,128,4,32]{3,1,2,0:T(8,128)}, s32[]{:T(128)}) tuple(%from, %q.1, %two)
  %while.1 = (s32[]{:T(128)}, f32[2,128,4,32]{3,1,2,0:T(8,128)}, s32[]{:T(128)}) while(%before), condition=%condition, body=%body
  %start = (bf16[32,128]{1,0}, bf16[128,128]{1,0}, u32[]) fusion(%w), kind=kCustom, calls=%begins
  %all-gather.1 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}
  %kernel = (bf16[1,8,64,32]{3,2,1,0}, f32[8,64]{1,0}) custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %scattered = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_tpu_program():
    """A product as a dilated convolution, five turns told by the condition alone, a reduce-scatter as a fusion; an all-gather that ends in a
    loop and counts where it begins, and one whose first turn of six stands before the loop.
    """
    found = hlo_cost.cost(TPU, 4)
    assert found.flops == 5 * 2 * 2 * 4 * 128 * 128 * 32
    whole = 128 * 128 * 2
    assert found.summed("payload") == {
        "all-gather": (1 + 6) * whole,
        "reduce-scatter": whole / 4,
    }
    assert found.summed("sent")["reduce-scatter"] == whole * 3 / 4
    assert found.unknown == ("kernel",)


@pytest.mark.parametrize(
    ("before", "after", "turns"),
    [
        ("direction=LT", "direction=LE", 6),
        ("direction=LT", "direction=NE", 5),
        ("constant(12)", "constant(11)", 5),
        ("compare(%i.1, %last), direction=LT", "compare(%last, %i.1), direction=GT", 5),
        ("add(%i, %by)", "multiply(%i, %by)", None),
    ],
)
def test_conditions_of_loops(before, after, turns):
    assert before in TPU
    module = hlo.read(TPU.replace(before, after))
    main = module.computations[module.entry]
    assert hlo.trips(module, main, main["while.1"]) == turns


def test_a_loop_that_is_not_understood_is_told():
    found = hlo_cost.cost(TPU.replace("add(%i, %by)", "multiply(%i, %by)"), 4)
    assert "while.1" in found.unknown and found.flops == 2 * 2 * 4 * 128 * 128 * 32


def kernel(name: str, rest: str = "") -> tuple[hlo.Instruction, hlo.Computation]:
    shape = "bf16[8,64,32]{2,1,0}"
    inside = {n: hlo.Instruction(n, shape, "parameter", ("0",), "", False) for n in "qkv"}
    inside["m"] = hlo.Instruction("m", "s8[1,1,2]{2,1,0}", "parameter", ("0",), "", False)
    return hlo.Instruction(name, shape, "custom-call", ("m", "q", "k", "v"), rest, False), inside


def test_kernels():
    x, inside = kernel("splash_mha_fwd_residuals.3")
    assert hlo_cost.kernel_flops(x, inside, 0.5) == 0.5 * 2 * 2 * 8 * 64 * 64 * 32
    x, inside = kernel("custom-call.7", 'metadata={op_name="jit(f)/splash_mha_dkv_segmented"}')
    assert hlo_cost.kernel_flops(x, inside, 1.0) == 4 * 2 * 8 * 64 * 64 * 32
    shape = "bf16[8,64,32]{2,1,0}"
    fused = hlo.Instruction("splash_mha_dkv.1", f"(bf16[4,8,64,32]{{3,2,1,0}}, {shape}, {shape})", *x[2:])
    assert hlo_cost.kernel_flops(fused, inside, 1.0) == 5 * 2 * 8 * 64 * 64 * 32
    x, inside = kernel(
        "mine", 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"123","transcendentals":"0"}}}'
    )
    assert hlo_cost.kernel_flops(x, inside, 1.0) == 123
    assert hlo_cost.kernel_flops(*kernel("mine"), 1.0) is None


COLLECTIVES = {
    "all-gather": (lambda x: lax.all_gather(x, "d", tiled=True), 8, 7),
    "reduce-scatter": (lambda x: lax.psum_scatter(x, "d", tiled=True), 1 / 8, 7 / 8),
    "all-reduce": (lambda x: lax.psum(x, "d"), 1, 2 * 7 / 8),
    "all-to-all": (lambda x: lax.all_to_all(x, "d", 0, 0, tiled=True), 1, 7 / 8),
    "collective-permute": (lambda x: lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]), 1, 1),
}


def test_collectives_of_one_number_are_counted_each():
    """A `shard_map` numbers all its collectives alike."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def twice(x):
        return lax.ppermute(lax.ppermute(x, "d", [(0, 1)]) * 2, "d", [(1, 2)])

    spec = jax.sharding.PartitionSpec("d")
    text = (
        jax.jit(jax.shard_map(twice, mesh=mesh, in_specs=spec, out_specs=spec))
        .lower(jnp.ones((8, 4)))
        .compile()
        .as_text()
    )
    assert hlo_cost.cost(text, 8).summed("payload") == {"collective-permute": 2 * 4 * 4}


@pytest.mark.parametrize("kind", list(COLLECTIVES))
def test_collectives_of_eight_devices(kind):
    """Three of them in a loop, of 16 rows of 128 values on each device."""
    function, payload, sent = COLLECTIVES[kind]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def looped(x):
        def turn(total, i):
            return total + jnp.sum(function(x * i)), None

        return lax.scan(turn, jnp.zeros(()), jnp.arange(3.0))[0][None]

    mapped = jax.shard_map(looped, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    found = hlo_cost.cost(compiled(mapped, of(128, 128)), 8)
    size = 16 * 128 * 4
    assert found.summed("payload") == {kind: 3 * payload * size}
    assert found.summed("sent")[kind] == pytest.approx(3 * sent * size)


def test_sharded_products_gather_their_weights():
    """A step over weights that are split: each device multiplies its rows by the whole weight."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, split = (jax.NamedSharding(mesh, P(*names)) for names in (("d", None), (None, "d")))
    arguments = (
        jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=split),
    )
    text = jax.jit(lambda x, w: x @ w, out_shardings=rows).lower(*arguments).compile().as_text()
    found = hlo_cost.cost(text, 8)
    assert found.flops == 2 * 8 * 256 * 512
    assert found.summed("payload") == {"all-gather": 256 * 512 * 4}


def test_memory_of_a_slice_is_the_slice():
    def cut(x, i):
        return lax.dynamic_index_in_dim(x, i, keepdims=False) * 2

    found = hlo_cost.cost(compiled(cut, of(1000, 64, 128), of(dtype=jnp.int32)))
    assert 2 * 64 * 128 * 4 <= found.memory <= 6 * 64 * 128 * 4


def test_an_instruction_over_several_lines():
    """Pallas' kernels are printed so; what follows them belongs to the same computation."""
    module = hlo.read(
        "ENTRY %main (p: f32[2]) -> f32[2] {\n"
        "  %p = f32[2]{0} parameter(0)\n"
        '  %k = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{}"\n'
        '}}, metadata={op_name="splash"}\n'
        "  ROOT %c = f32[2]{0} copy(%k)\n"
        "}\n"
    )
    assert list(module.computations["main"]) == ["p", "k", "c"] and hlo.root(module.computations["main"]).name == "c"
    assert 'op_name="splash"' in module.computations["main"]["k"].rest
