import pytest

from vitrify.bench.hamming import SHAPES
from vitrify.bench.reference import check_attention
from vitrify.bench.registry import prepare
from vitrify.errors import InputError

CASE = {"batch_size": 1, "heads": 2, "tokens": 49, "value_dim": 32, "code_dim": 12}
CASE |= {"dtype": "float32", "device": "cpu", "compile": False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_contenders_pass_their_checks(dtype):
    prepared = prepare("hamming", {**CASE, "dtype": dtype})
    names = [contender.name for contender in prepared.contenders]
    assert names == ["matmul", "masked sums", "hamming", "hamming bits", "SDPA"]
    assert prepared.baselines == dict.fromkeys(names, "matmul")
    inputs = prepared.inputs(0)
    assert set(inputs.query.unique().tolist()) == {0, 1}
    assert inputs.query_bits.shape == (1, 2, 49, 2)
    for contender in prepared.contenders:
        check = contender.check(inputs)
        assert check.passed, (contender.name, check)


def test_a_wrong_sum_is_found():
    inputs = prepare("hamming", CASE).inputs(0)
    right = inputs.query @ inputs.key.mT @ inputs.value
    arguments = (inputs.query, inputs.key, inputs.value)
    assert check_attention(right, *arguments, scale=1.0, kind="sums").passed
    right[0, 0, 0, 0] += 1e-3 * right.abs().max()
    assert not check_attention(right, *arguments, scale=1.0, kind="sums").passed


def test_floors_count_two_products_and_what_is_read():
    contenders = {contender.name: contender.cost for contender in prepare("hamming", CASE).contenders}
    assert contenders["matmul"].flops == contenders["hamming bits"].flops == 2 * 2 * 2 * 49 * 12 * 32
    assert contenders["SDPA"].flops == 2 * 2 * 49 * 49 * (12 + 32)
    assert contenders["matmul"].bytes_moved == 2 * 49 * (2 * 32 + 2 * 12) * 4
    assert contenders["hamming bits"].bytes_moved == 2 * 49 * (2 * 32 * 4 + 2 * 2)


def test_compiled_twins():
    prepared = prepare("hamming", {**CASE, "compile": True})
    assert prepared.baselines["hamming compiled"] == "matmul compiled"
    assert [contender.name for contender in prepared.contenders][:2] == ["matmul", "matmul compiled"]


def test_shapes_are_those_of_pvts_first_stages():
    assert [tokens for _, _, tokens, *_ in SHAPES] == [56**2, 28**2, 14**2]


def test_bad_sizes_are_refused():
    with pytest.raises(InputError, match="code_dim must be at least 1, not 0"):
        prepare("hamming", {**CASE, "code_dim": 0})
