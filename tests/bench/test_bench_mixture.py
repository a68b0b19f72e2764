"""The mixture benchmark: splits are exact, every way to run it gives the same rows, a wrong one is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitrify.bench import registry
from vitrify.bench.mixture import cost, prepare
from vitrify.errors import InputError

CASE = {
    "rows": 50,
    "inputs": 24,
    "outputs": 40,
    "multiply": 0.4,
    "dtype": "float32",
    "device": "cpu",
    "compile": False,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 12), (0.4, 20), (1.0, 50)])
def test_every_contender_passes_at_every_split(share, count, dtype):
    prepared = prepare({**CASE, "multiply": share, "dtype": dtype})
    names = ["multiply", "mixture", "mixture int8", "both and select", "two matmuls"]
    assert [c.name for c in prepared.contenders] == names
    inputs = prepared.inputs(3)
    assert (inputs.index == 0).sum() == count
    for contender in prepared.contenders:
        assert contender.check(inputs).passed, contender.name
        assert prepared.baselines[contender.name] == "multiply"


def test_inputs_are_random_and_seeded():
    prepared = prepare(CASE)
    first, same, other = prepared.inputs(0), prepared.inputs(0), prepared.inputs(1)
    assert torch.equal(first.tokens, same.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.index, other.index)


def test_a_mixture_that_sends_tokens_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr("vitrify.nn.mixture.dispatch", lambda x, index, experts: experts[0](x))
    checks = {c.name: c.check(prepare(CASE).inputs(0)) for c in prepare(CASE).contenders}
    assert [name for name, check in checks.items() if not check.passed] == ["mixture", "mixture int8"]


def test_costs():
    assert cost("multiply", CASE).flops == 2 * 50 * 24 * 40
    assert cost("both and select", CASE).flops == 2 * (2 * 50 * 24 * 40 + 2 * 50 * 24)
    assert cost("mixture compiled", CASE) == cost("two matmuls", CASE)
    for name, kind in {"int8": "int8", "float8": "float8_e4m3fn", "float8 compiled": "float8_e4m3fn"}.items():
        rounded = cost(f"mixture {name}", CASE)
        assert rounded == dataclasses.replace(cost("mixture", CASE), narrow={kind: 2 * 30 * 24 * 40})
    activations, weight = 50 * 64 * 4, 24 * 40
    found = [cost("mixture", {**CASE, "multiply": share}).bytes_moved - activations for share in (0, 0.4, 1)]
    assert found == [weight // 2, weight * 4 + weight // 2, weight * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"multiply": 40}, "share of the tokens, from 0 to 1, not 40"),
        ({"dtype": "int8"}, "float32, bfloat16, float16, not 'int8'"),
    ],
)
def test_bad_cases_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        prepare({**CASE, **change})


@pytest.mark.slow
def test_compiled_contenders_pass_their_checks():
    prepared = registry.prepare("mixture", {**CASE, "compile": True})
    compiled = [c for c in prepared.contenders if c.name.endswith("compiled")]
    names = ["multiply", "mixture", "mixture int8", "both and select"]
    assert [c.name for c in compiled] == [f"{name} compiled" for name in names]
    for contender in compiled:
        assert prepared.baselines[contender.name] == "multiply compiled"
        assert contender.check(prepared.inputs(0)).passed, contender.name
