"""Energy of workloads built by hand: the authors' figures, what like for like means, and that nothing is lost."""

import time
from dataclasses import astuple, replace

import pytest
from cost_workloads import conv, deit_base, matmul, vectors, workload

import vitrify
from vitrify import InputError
from vitrify.cost import eyeriss
from vitrify.cost.charges import CONTENDERS, Prices
from vitrify.cost.split import Split


def energy(*operations, preset="like_for_like", **kwargs):
    return vitrify.energy(workload(*operations), preset=preset, **kwargs)


# (rows, C_in, C_out): pJ per MAC of the authors' FP32 multiply, shift and add. Their code, run on these layers.
PUBLISHED = {
    (3136, 32, 256): (52.22, 15.29, 23.56),
    (784, 64, 512): (46.12, 13.39, 23.33),
    (196, 160, 640): (43.24, 12.49, 23.19),
    (49, 256, 1024): (46.98, 13.66, 23.16),
}


@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
@pytest.mark.parametrize("primitive", ["multiply", "shift", "add"])
def test_as_published_gives_the_authors_figures(shape, primitive):
    layer = matmul(*shape, primitive=primitive)
    figure = PUBLISHED[shape][["multiply", "shift", "add"].index(primitive)]
    assert energy(layer, preset="as_published").total_pj / layer.macs == pytest.approx(figure, abs=0.006)


@pytest.mark.parametrize(
    ("contender", "figure"), [("INT32 shift", 42.55), ("INT8 multiply", 10.80), ("INT8 shift", 10.63)]
)
def test_as_published_at_other_widths(contender, figure):
    layer = matmul(784, 64, 512)
    (row,) = energy(layer, preset="as_published").compare
    assert row.pj[contender] / layer.macs == pytest.approx(figure, abs=0.006)


def test_as_published_takes_no_notice_of_the_widths_that_the_workload_has():
    wide, narrow = matmul(784, 64, 512, primitive="shift"), matmul(784, 64, 512, primitive="shift", bits=(8, 4, 32))
    assert energy(wide, preset="as_published").total == energy(narrow, preset="as_published").total


def test_as_published_gives_adds_free_memory_and_stacks_the_heads():
    total = energy(matmul(784, 64, 512, primitive="add"), preset="as_published").total
    assert (total.dram, total.sram) == (0, 0)
    assert total.noc > 0  # partial sums alone
    heads = energy(matmul(49, 64, 512, count=16), preset="as_published")
    assert heads.total == energy(matmul(784, 64, 512), preset="as_published").total


def test_like_for_like_gives_each_head_its_own_right_operand():
    one, many = energy(matmul(49, 64, 512)), energy(matmul(49, 64, 512, count=16))
    assert many.total_pj == pytest.approx(16 * one.total_pj)
    assert many.total_pj > energy(matmul(784, 64, 512)).total_pj


@pytest.mark.parametrize("preset", ["like_for_like", "as_published"])
def test_the_parts_add_up(preset):
    operations = [
        conv(2, 3, 32, 32, 3, 2),
        conv(1, 16, 16, 14, 3, groups=16, number=1),
        matmul(49, 64, 96, number=2, primitive="shift", bits=(16, 4, 32)),
        matmul(49, 16, 49, number=3, count=4, primitive="add", bits=(1, 32, 32)),
        *vectors(["compare", "exp", "div"], (4, 49, 49), first=4),
    ]
    result = energy(*operations, preset=preset)
    assert [op.id for op in result.operations] == [op.id for op in operations]
    assert result.total_pj == pytest.approx(sum(op.split.total_pj for op in result.operations))
    assert result.total_pj == pytest.approx(sum(astuple(result.total)))
    assert sum(row.pj["as built"] for row in result.compare) == pytest.approx(result.total_pj - result.vector_pj)
    assert sum(row.macs for row in result.compare) == workload(*operations).macs
    assert (result.vector_pj > 0) == (preset == "like_for_like")
    for op in result.operations[:4]:
        assert min(astuple(op.split)[:3]) > 0


def test_compute_is_every_product_and_every_accumulation():
    layer = matmul(20, 30, 40)
    assert energy(layer).total.compute == pytest.approx(layer.macs * (3.7 + 0.9))
    assert energy(layer, preset="as_published").total.compute == pytest.approx(layer.macs * 3.7)
    shifted = replace(layer, primitive="shift", bits=(8, 4, 32))
    assert energy(shifted).total.compute == pytest.approx(layer.macs * (0.024 + 0.1))
    assert energy(replace(shifted, primitive="add")).total.compute == pytest.approx(layer.macs * 0.1)
    assert energy(replace(shifted, primitive="multiply")).total.compute == pytest.approx(
        layer.macs * (0.2 * (0.2 / 0.787) ** 0.5 + 0.1), rel=1e-3
    )
    # A shift of floating-point numbers adds to exponents, and their sums are floating-point.
    assert energy(replace(layer, primitive="shift")).total.compute == pytest.approx(layer.macs * (0.13 + 0.9))


def test_each_width_is_charged_where_it_is_moved():
    """At one fixed tiling, twice the bits of an operand add its own traffic once more and nothing else."""
    base = matmul(1, 1, 1, bits=(4, 4, 8), out=4)
    bit = {name: 1 / 16 * pj for name, pj in {"dram": 200, "sram": 22.2, "noc": 7.4, "psum": 3.7, "rf": 3.7}.items()}
    split = energy(base).total
    assert split.dram == pytest.approx(bit["dram"] * (4 + 4 + 4))
    assert split.sram == pytest.approx(bit["sram"] * (4 + 8))
    assert split.noc == pytest.approx(bit["noc"] * (4 + 4) + bit["psum"] * 8)
    assert split.register == pytest.approx(bit["rf"] * (4 + 8 + 2 * 4))
    wide_sums = energy(replace(base, bits=(4, 4, 15))).total
    assert (wide_sums.dram, wide_sums.sram) == (split.dram, pytest.approx(bit["sram"] * (4 + 15)))


@pytest.mark.parametrize("shape", [(197, 64, 197), (49, 256, 1024), (7, 5, 3)], ids=str)
@pytest.mark.parametrize("primitive", ["multiply", "shift", "add"])
def test_wider_data_is_never_cheaper(shape, primitive):
    def pj(*bits, out):
        return energy(matmul(*shape, primitive=primitive, bits=bits, out=out)).total_pj

    widths = [pj(b, b, s, out=b) for b, s in [(1, 8), (2, 8), (4, 16), (8, 16), (8, 32), (16, 32), (32, 32)]]
    assert widths == sorted(widths)
    assert len(set(widths)) == len(widths)
    for wider in [(8, 4, 16), (4, 8, 16), (4, 4, 32)]:
        assert pj(*wider, out=4) > pj(4, 4, 16, out=4)
    assert pj(4, 4, 16, out=8) > pj(4, 4, 16, out=4)


@pytest.mark.parametrize("preset", ["like_for_like", "as_published"])
def test_the_comparison_has_every_format_beside_shift_and_add_at_equal_widths(preset):
    (row,) = energy(matmul(196, 160, 640), preset=preset).compare
    assert list(row.pj) == ["as built", "as built, multiplied", *CONTENDERS]
    assert {"FP32 multiply", "BF16 multiply", "FP8 multiply", "INT8 multiply"} < set(row.pj)
    assert row.pj["as built"] == row.pj["as built, multiplied"] == row.pj["FP32 multiply"]
    for bits in (32, 8):
        multiply = row.pj["FP32 multiply" if bits == 32 else "INT8 multiply"]
        assert row.pj[f"INT{bits} add"] < multiply
        assert row.pj[f"INT{bits} shift"] < multiply
    # At equal widths the primitive hardly matters, the width does.
    assert row.pj["INT8 shift"] > 0.95 * row.pj["INT8 multiply"]
    assert row.pj["INT8 multiply"] < 0.5 * row.pj["INT32 shift"]


def test_groups_are_the_roles_in_a_block():
    result = vitrify.energy(deit_base())
    assert [row.group for row in result.compare] == [
        "conv",
        *(f"blocks.*.{name}" for name in ("attn.qkv", "attn qk", "attn av", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "head",
    ]
    assert result.compare[1].macs == 12 * 197 * 768 * 3 * 768


def test_a_kernel_that_fits_no_tiling_is_lowered_to_a_matmul():
    patch = conv(1, 3, 64, 64, 16, 16)
    assert energy(patch).total == energy(matmul(16, 768, 64)).total
    narrow = conv(1, 16, 64, 28, 3)
    assert energy(narrow).total.sram < energy(matmul(784, 144, 64)).total.sram  # overlapping windows share inputs
    assert energy(narrow).operations[0].tiling.e1 > 1


def test_element_wise_work_is_charged_by_the_table():
    shape, elements, register = (10, 20), 200, 3.7 / 16
    exp, move = vectors(["exp", "move"], shape, module="a")
    (exp_only,) = energy(exp).operations
    assert exp_only.split.compute == pytest.approx(elements * 27.7)
    assert exp_only.split.register == pytest.approx(elements * 2 * 32 * register)
    assert exp_only.split.sram == pytest.approx(2 * elements * 32 * 22.2 / 16)
    assert exp_only.split.dram == 0
    (moved,) = energy(replace(move, inputs=exp.inputs)).operations
    assert moved.split == Split(sram=exp_only.split.sram)
    (added,) = energy(replace(exp, vector="add")).operations
    assert added.split.register == pytest.approx(elements * 3 * 32 * register)
    (product,) = energy(*vectors(["mul"], shape, bits=16)).operations
    assert product.split.compute == pytest.approx(elements * 0.67)
    (index,) = energy(*vectors(["add"], shape, bits=64)).operations
    assert index.split.compute == pytest.approx(elements * 0.2)


def test_neighbours_of_one_module_and_step_pass_results_in_registers():
    chain = vectors(["exp", "add", "div"], (10, 20))
    once = 200 * 32 * 22.2 / 16
    assert [op.split.sram for op in energy(*chain).operations] == pytest.approx([once, 0, once])
    apart = [replace(op, module=f"m{i}") for i, op in enumerate(chain)]
    assert [op.split.sram for op in energy(*apart).operations] == pytest.approx([2 * once] * 3)
    # A matmul that reads a result, or stands between, breaks the chain.
    reader = replace(matmul(10, 20, 5, number=9), inputs=(chain[0].outputs[0], matmul(10, 20, 5).inputs[1]))
    assert energy(*chain, reader).operations[0].split.sram == pytest.approx(2 * once)
    between = energy(chain[0], matmul(10, 20, 5, number=9), *chain[1:])
    assert between.operations[0].split.sram == pytest.approx(2 * once)
    # The same input twice is fetched once.
    again = replace(chain[1], inputs=(*chain[1].inputs, *chain[0].inputs))
    assert energy(chain[0], again).operations[1].split.sram == pytest.approx(once)


def test_areas_are_those_of_a_product_and_its_accumulation():
    area = energy(matmul(4, 4, 4), matmul(4, 4, 4, number=1, primitive="shift", bits=(8, 4, 32))).area_um2
    assert area["FP32 multiply"] == 7700 + 4184
    assert area["INT8 multiply"] == 282 + 137
    assert area["INT8 shift"] == 34 + 137
    assert area["INT8 add"] == 137
    assert area["as built: multiply 32 x 32"] == area["FP32 multiply"]
    assert area["as built: shift 8 x 4"] == area["INT8 shift"]
    assert energy(matmul(4, 4, 4)).pes == 192


def test_dram_is_a_choice_and_user_tables_take_part(tmp_path):
    layer = matmul(49, 64, 64)
    default, hbm = energy(layer), energy(layer, dram="hbm2")
    assert hbm.total.dram == pytest.approx(default.total.dram * 3.9 / 12.5, rel=0.3)
    assert hbm.total_pj < energy(layer, dram="ddr4").total_pj
    table = tmp_path / "mine.yaml"
    fields = "node: 28, source: us, status: published"
    table.write_text(
        f"extends: horowitz45\nsources: {{us: ours}}\nenergy: {{add: {{fp32: {{value: 5, unit: pJ, {fields}}}}}}}\n"
        f"access: {{sram: {{value: 0, unit: pJ/bit, {fields}}}}}"
    )
    mine = energy(layer, unit_costs=str(table))
    assert mine.total.compute == pytest.approx(layer.macs * (3.7 + 5))
    assert mine.total.sram == 0
    assert mine.total.register == pytest.approx(default.total.register, rel=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "eyeris"}, "unknown target 'eyeris': did you mean 'eyeriss'"),
        ({"preset": "published"}, "unknown preset 'published': did you mean 'as_published'"),
        ({"unit_costs": "horowitz"}, "unknown unit-cost table 'horowitz': did you mean 'horowitz45'"),
        ({"dram": "hbm"}, "unknown key 'dram.hbm': did you mean 'dram.hbm2'"),
        (
            {"unit_costs": "aladdin40"},
            "unit-cost table 'aladdin40': unknown key 'energy.multiply.fp32': did you mean 'energy.multiply.int32'",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InputError) as raised:
        energy(matmul(4, 4, 4), **{"preset": "like_for_like", **change})
    assert message in str(raised.value)


def test_widths_without_a_price_name_the_operation():
    with pytest.raises(InputError, match=r"operation op0 \(layer\): no floating-point format of 24 bits has a price"):
        energy(matmul(4, 4, 4, bits=(24, 24, 32)))
    with pytest.raises(InputError, match=r"operation op0 \(layer\): bits must be at least 1, not \(0, 8, 32\)"):
        energy(matmul(4, 4, 4, bits=(0, 8, 32)))


def test_nothing_to_do_costs_nothing_and_the_unknown_is_carried():
    empty = energy(matmul(0, 8, 8))
    assert empty.total_pj == 0
    result = vitrify.energy(workload(matmul(2, 2, 2), grid_sample=3))
    assert result.unknown == {"grid_sample": 3}
    assert "charged nothing, as no rule knows them: grid_sample" in str(result)
    assert "INT8 multiply" in str(result)
    assert "of 192 PEs, um2: FP32 multiply 11,884, BF16 multiply" in str(result)


def test_deit_base_takes_seconds_from_cold_caches_and_equal_layers_are_searched_once():
    eyeriss.search.cache_clear()
    eyeriss._candidates.cache_clear()
    start = time.process_time()
    result = vitrify.energy(deit_base())
    assert time.process_time() - start < 5
    # 8 distinct layers, one of them in two forms, each with 10 contenders, of which what is built is one.
    assert eyeriss.search.cache_info().misses == 9 * len(CONTENDERS)
    assert result.total_pj / deit_base().macs == pytest.approx(45, rel=0.05)


def test_prices_come_from_the_tables_alone():
    prices = Prices.from_tables("horowitz45", None)
    assert prices.per_bit == pytest.approx(
        {
            "dram": 12.5,
            "sram": 22.2 / 16,
            "noc": 7.4 / 16,
            "noc_psum": 3.7 / 16,
            "register": 3.7 / 16,
            "register_weight": 7.4 / 16,
        }
    )
