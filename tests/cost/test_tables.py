"""Unit costs: what ships is complete and follows the methods it names; what a user gets wrong is named."""

import math

import pytest

from vitrify.cost.table_schema import FORMATS, OPERATIONS
from vitrify.cost.tables import load, names, scale
from vitrify.errors import InputError

SIGNIFICAND = {"fp32": 24, "fp16": 11, "bf16": 8, "fp8": 4}
BITS = {**SIGNIFICAND, "int32": 32, "int16": 16, "int8": 8}
WIDTH = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int32": 32, "int16": 16, "int8": 8}


def value(key, table="horowitz45"):
    return load(table)[key].value


def test_what_ships_is_loaded_with_unit_node_source_and_standing():
    assert names() == ["aladdin40", "cacti28", "dram", "eyeriss", "eyeriss_shiftaddvit", "horowitz45", "scaling"]
    for name in names():
        table = load(name)
        assert table.title
        assert table.entries
        for entry in table.entries.values():
            assert entry.source
            assert entry.unit
            assert (entry.status == "published") == (not entry.how)


def test_the_register_and_the_network_at_28_nm_are_the_older_figures_scaled():
    table, aladdin = load("cacti28"), load("aladdin40")
    energy, area = (scale(40, 28, quantity).value for quantity in ("energy", "area"))
    register = table["access.register"].pj_per_bit
    assert register == pytest.approx(aladdin["access.register"].pj_per_bit * energy)
    assert table["area.register.bit"].value == pytest.approx(aladdin["area.register.bit"].value * area, rel=1e-3)
    mac = value("energy.multiply.int16") + value("energy.add.int32")
    noc = load("eyeriss")["access.noc"].value * mac * scale(45, 28, "energy").value
    assert table["access.noc"].value == pytest.approx(noc, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "published"),
    [
        ("energy.multiply.fp32", 3.7),
        ("energy.multiply.fp16", 1.1),
        ("energy.multiply.int32", 3.1),
        ("energy.multiply.int8", 0.2),
        ("energy.add.fp32", 0.9),
        ("energy.add.fp16", 0.4),
        ("energy.add.int32", 0.1),
        ("energy.add.int16", 0.05),
        ("energy.add.int8", 0.03),
        ("energy.shift.int32", 0.13),
        ("energy.shift.int16", 0.057),
        ("energy.shift.int8", 0.024),
        ("area.multiply.fp32", 7700),
        ("area.multiply.fp16", 1640),
        ("area.multiply.int32", 3495),
        ("area.multiply.int8", 282),
        ("area.add.fp32", 4184),
        ("area.add.fp16", 1360),
        ("area.add.int32", 137),
        ("area.add.int16", 67),
        ("area.add.int8", 36),
        ("area.shift.int32", 157),
        ("area.shift.int16", 73),
        ("area.shift.int8", 34),
    ],
)
def test_the_published_figures_at_45_nm(key, published):
    entry = load("horowitz45")[key]
    assert (entry.value, entry.status, entry.node_nm) == (published, "published", 45)


def test_every_operation_has_a_price_in_every_format_that_it_is_used_in():
    for operation in OPERATIONS:
        formats = [f for f in FORMATS if f != "int4" and not (operation == "shift" and f in SIGNIFICAND)]
        assert all(value(f"energy.{operation}.{f}") > 0 for f in formats)


def power_law(start, end, ratio, point):
    return start * point ** (math.log(end / start) / math.log(ratio))


@pytest.mark.parametrize("section", ["energy", "area"])
def test_narrow_floats_and_int16_multiplication_follow_the_law_that_they_name(section):
    for operation in ("multiply", "add"):
        fp32, fp16 = (value(f"{section}.{operation}.{f}") for f in ("fp32", "fp16"))
        for name in ("bf16", "fp8"):
            derived = power_law(fp32, fp16, 11 / 24, SIGNIFICAND[name] / 24)
            assert value(f"{section}.{operation}.{name}") == pytest.approx(derived, rel=5e-3)
    int32, int8 = (value(f"{section}.multiply.{f}") for f in ("int32", "int8"))
    assert value(f"{section}.multiply.int16") == pytest.approx(power_law(int32, int8, 1 / 4, 1 / 2), rel=5e-3)


@pytest.mark.parametrize("name", BITS)
def test_special_functions_are_made_of_the_tables_own_operations(name):
    multiply, add = value(f"energy.multiply.{name}"), value(f"energy.add.{name}")
    integer = f"int{WIDTH[name]}"
    subtract = value(f"energy.add.{integer}")
    floating = name in SIGNIFICAND
    degree = next(
        d for d in range(20) if 2 * (math.log(2) / 4) ** (d + 1) / math.factorial(d + 1) <= 2.0 ** (1 - BITS[name])
    )
    exponent = subtract if floating else value(f"energy.shift.{integer}")
    exp = (degree + 1) * (multiply + add) + exponent
    div = BITS[name] * subtract + (add if floating else 0)
    erf_degree = 5 if WIDTH[name] == 32 else 3
    expected = {
        "exp": exp,
        "div": div,
        "sqrt": div,
        "tanh": exp + div + 2 * add,
        "erf": (erf_degree + 3) * multiply + (erf_degree + 1) * add + div + exp,
        "compare": subtract,
    }
    for operation, derived in expected.items():
        entry = load("horowitz45")[f"energy.{operation}.{name}"]
        assert entry.value == pytest.approx(derived, rel=5e-3), operation
        assert entry.status == "derived"


def test_the_polynomial_for_exp_is_as_accurate_as_its_method_says():
    """The minimax error of degree d is about 2 (ln 2 / 4)^(d+1) / (d+1)!: Chebyshev's, measured."""
    half = math.log(2) / 2
    for degree in (1, 2, 3, 5):
        nodes = [half * math.cos(math.pi * (2 * i + 1) / (2 * degree + 2)) for i in range(degree + 1)]

        def interpolated(x, nodes=nodes):
            terms = (math.exp(a) * math.prod((x - b) / (a - b) for b in nodes if b != a) for a in nodes)
            return sum(terms)

        worst = max(abs(interpolated(half * i / 500) - math.exp(half * i / 500)) for i in range(-500, 501))
        assert worst == pytest.approx(2 * (half / 2) ** (degree + 1) / math.factorial(degree + 1), rel=0.3)


def test_widths_between_and_beyond_the_table_follow_a_power_law_and_say_so():
    table = load("horowitz45")
    assert table.at_width("energy", "shift", 16) is table["energy.shift.int16"]
    middle = table.at_width("energy", "shift", 12)
    assert middle.value == pytest.approx(0.024 * 1.5 ** math.log2(0.057 / 0.024))
    assert (middle.status, middle.how) == ("derived", "between int8 and int16: a power law in the width")
    assert table.at_width("energy", "multiply", 4).value == pytest.approx(0.2 * 0.2 / 0.787)
    assert table.at_width("energy", "add", 64).how.startswith("beyond int16 and int32")
    prices = [table.at_width("energy", "multiply", bits).value for bits in range(1, 65)]
    assert prices == sorted(prices)


def test_the_area_of_an_8_bit_float_multiplier_is_near_that_of_the_integer_one():
    """A check of the law against gates that it does not know: 4 x 4 bits and the exponents, against 8 x 8 bits."""
    assert 0.5 < value("area.multiply.fp8") / value("area.multiply.int8") < 1
    assert 0.5 < value("energy.multiply.fp8") / value("energy.multiply.int8") < 1.5


def test_prices_of_moving_bits():
    assert load("dram")["dram.horowitz"].pj_per_bit == pytest.approx(1300 / 64)
    assert load("eyeriss_shiftaddvit")["access.dram"].pj_per_bit == 12.5
    assert load("aladdin40")["access.register"].pj_per_bit == 0.009
    relative, ours = load("eyeriss"), load("eyeriss_shiftaddvit")
    for level in ("sram", "noc", "register"):
        assert ours[f"access.{level}"].value == pytest.approx(3.7 * relative[f"access.{level}"].value)
    with pytest.raises(InputError, match="6 MAC/16bit is no price in pJ"):
        _ = relative["access.sram"].pj_per_bit


def test_scaling_between_nodes():
    assert scale(45, 28, "area").value == 0.377
    assert scale(45, 28, "area").status == "published"
    assert scale(28, 28, "energy").value == 1
    back = scale(28, 65, "energy")
    assert (back.value, back.status) == (pytest.approx(1 / 0.40), "derived")
    assert scale(130, 45, "energy").value == pytest.approx(0.16 / 0.51)
    with pytest.raises(
        InputError, match=r"unknown key 'scaling.energy.46'.*did you mean 'scaling.energy.65' or 'scaling.energy.45'"
    ):
        scale(46, 28, "energy")


GOOD = """
title: mine
sources: {bench: our bench, 2024}
methods: {guess: by eye}
energy:
  multiply:
    int8: {value: 0.15, unit: pJ, node: 28, source: bench, status: published}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def test_a_users_table_by_path(write):
    good = GOOD.replace("our bench, 2024", '"our bench, 2024"')
    entry = load(write(good))["energy.multiply.int8"]
    assert (entry.value, entry.node_nm, entry.source) == (0.15, 28, "our bench, 2024")
    extended = load(write("extends: horowitz45" + good))
    assert extended["energy.multiply.int8"].value == 0.15
    assert extended["energy.multiply.fp32"].value == 3.7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("energy:", "enrgy:", "unknown key 'enrgy': did you mean 'energy'"),
        ("multiply:", "multipy:", "unknown key in energy 'multipy': did you mean 'multiply'"),
        ("int8:", "int9:", "unknown key in energy.multiply 'int9': did you mean 'int8'"),
        ("node:", "nodes:", "unknown key in energy.multiply.int8 'nodes': did you mean 'node'"),
        ("value: 0.15, ", "", "energy.multiply.int8 has no value"),
        ("value: 0.15", "value:", "energy.multiply.int8 has no value"),
        ("unit: pJ, ", "", "energy.multiply.int8 has no unit"),
        ("source: bench, ", "", "energy.multiply.int8 has no source"),
        ("0.15", "-0.15", "energy.multiply.int8.value must not be negative, not -0.15"),
        ("0.15", "cheap", "energy.multiply.int8.value must be a number, not 'cheap'"),
        ("0.15", ".nan", "energy.multiply.int8.value must be a number, not nan"),
        ("0.15", "true", "energy.multiply.int8.value must be a number, not True"),
        ("node: 28", "node: -28", "energy.multiply.int8.node must not be negative"),
        ("unit: pJ", "unit: nJ", "energy.multiply.int8.unit must be pJ, not 'nJ'"),
        ("source: bench", "source: bunch", "energy.multiply.int8.source 'bunch': did you mean 'bench'"),
        ("status: published", "status: guessed", "energy.multiply.int8.status must be 'published' or 'derived'"),
        ("status: published", "status: derived", "energy.multiply.int8 is derived: `how` names the method"),
        ("status: published", "status: published, how: guess", "int8 is published: `how` names the method"),
        ("status: published", "status: derived, how: gues", "energy.multiply.int8.how 'gues': did you mean 'guess'"),
        ("status: published", "status: published, range: 3", "range must be [least, greatest], not 3"),
        ("status: published", "status: published, range: [-1, 3]", "range must not be negative, not -1"),
        ("title: mine", "title: 3", "title must be text, not 3"),
        ("our bench", "[a]", "sources.bench must be text, not ['a']"),
        ("title: mine", "extends: horowitz54", "unknown unit-cost table 'horowitz54': did you mean 'horowitz45'"),
    ],
)
def test_a_faulty_table_is_refused_by_file_and_key(write, old, new, message):
    good = GOOD.replace("our bench, 2024", "our bench")
    assert old in good
    path = write(good.replace(old, new))
    with pytest.raises(InputError) as raised:
        load(path)
    assert message in str(raised.value)
    if "extends" not in new:
        assert str(path) in str(raised.value)


def test_files_that_are_no_tables(write, tmp_path):
    with pytest.raises(InputError, match=r"unit-cost table '.*gone.yaml' does not exist"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match=r"'.*list.yaml': the file must be a mapping, not \[1\]"):
        load(write("[1]", "list.yaml"))
    with pytest.raises(InputError, match=r"unknown unit-cost table 'horowitz': did you mean 'horowitz45'"):
        load("horowitz")
    circle = write("", "circle.yaml")
    circle.write_text(f"extends: {circle}")
    with pytest.raises(InputError, match="in a circle"):
        load(circle)
