import pytest
import torch

from vitrify import bench
from vitrify.bench.attention import cost
from vitrify.bench.registry import prepare
from vitrify.errors import InputError

CASE = {
    "tokens": 63,
    "heads": 3,
    "head_dim": 16,
    "batch_size": 2,
    "dtype": "float32",
    "device": "cpu",
    "compile": False,
}


def test_inputs_are_random_and_equal_in_both_layouts():
    prepared = prepare("attention", CASE)
    first, second = prepared.inputs(0), prepared.inputs(1)
    for contiguous, packed in zip(first.contiguous, first.packed, strict=True):
        assert contiguous.shape == (2, 3, 63, 16)
        assert torch.equal(contiguous, packed)
        assert contiguous.is_contiguous()
        assert packed.stride() == (63 * 3 * 3 * 16, 16, 3 * 3 * 16, 1)  # (batch, tokens, 3, heads, head_dim)
        assert contiguous.std() > 0.5
    assert not torch.equal(first.contiguous[0], second.contiguous[0])
    assert torch.equal(first.contiguous[0], prepared.inputs(0).contiguous[0])


def test_every_contender_passes_its_check_and_has_a_baseline():
    prepared = prepare("attention", CASE)
    names = [contender.name for contender in prepared.contenders]
    assert names == ["SDPA", "Taylor", "SDPA packed", "Taylor packed"]
    assert prepared.baselines["Taylor packed"] == "SDPA packed"
    for contender in prepared.contenders:
        assert contender.check(prepared.inputs(3)).passed, contender.name


def test_a_wrong_op_is_refused(monkeypatch):
    monkeypatch.setattr("vitrify.bench.attention.taylor_attention", lambda q, k, v: v + 1e-3)
    checks = {c.name: c.check(prepare("attention", CASE).inputs(0)) for c in prepare("attention", CASE).contenders}
    assert [name for name, check in checks.items() if not check.passed] == ["Taylor", "Taylor packed"]


def test_costs_are_those_of_the_paper():
    # DeiT-Tiny: 12 blocks, 3 heads of 64, 197 tokens (docs/papers.md 2); a multiply-add is two operations.
    case = {**CASE, "tokens": 197, "heads": 3, "head_dim": 64, "batch_size": 1}
    assert 12 * cost("softmax", case).flops / 2 == pytest.approx(178.83e6, rel=1e-4)
    assert 12 * cost("taylor", case).flops / 2 == pytest.approx(58.25e6, rel=1e-4)
    assert cost("taylor", case).bytes_moved == 4 * 3 * 197 * 64 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"dtype": "int8"}, "float32, bfloat16, float16, not 'int8'"),
    ],
)
def test_bad_cases_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        prepare("attention", {**CASE, **change})


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'attention'"):
        bench.run("atention", [CASE], seconds=0)


@pytest.mark.slow
def test_compiled_contenders_pass_their_checks():
    prepared = prepare("attention", {**CASE, "compile": True})
    compiled = [contender for contender in prepared.contenders if contender.name.endswith("compiled")]
    assert len(compiled) == 4
    for contender in compiled:
        assert contender.check(prepared.inputs(0)).passed, contender.name
