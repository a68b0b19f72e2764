import pytest
import torch
from torch.nn.attention import SDPBackend

from vitrify import bench
from vitrify.bench.attention import cost, objection, views
from vitrify.bench.registry import prepare
from vitrify.errors import InputError
from vitrify.ops import taylor_attention

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
    for contiguous, packed in zip(first.contiguous, views(first.packed), strict=True):
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


def test_both_layouts_have_the_same_upstream_gradient_in_their_own_strides():
    contiguous, packed = prepare("attention", CASE).inputs(0).upstream
    assert torch.equal(contiguous, packed)
    assert contiguous.is_contiguous()
    assert packed.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 63])
def test_backward_returns_the_gradients_of_the_inputs_and_they_pass(dtype, tokens):
    prepared = prepare("attention", {**CASE, "backward": True, "dtype": dtype, "tokens": tokens})
    inputs = prepared.inputs(3)
    for contender in prepared.contenders:
        assert contender.check(inputs).passed, contender.name
        packed = contender.name.endswith("packed")
        expected = [(2, tokens, 3, 3, 16)] if packed else [(2, 3, tokens, 16)] * 3
        assert [tuple(gradient.shape) for gradient in contender.run(inputs)] == expected
    assert not inputs.packed.requires_grad


def test_a_wrong_gradient_is_refused(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(key):
            return key.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * gradient

    right = taylor_attention
    monkeypatch.setattr("vitrify.bench.attention.taylor_attention", lambda q, k, v: right(q, Wrong.apply(k), v))
    for backward in (False, True):
        prepared = prepare("attention", {**CASE, "backward": backward})
        checks = {c.name: c.check(prepared.inputs(0)) for c in prepared.contenders}
        refused = [name for name, check in checks.items() if not check.passed]
        assert refused == (["Taylor", "Taylor packed"] if backward else [])
    assert "gradient of the key" in checks["Taylor"].against


def test_a_kernel_that_takes_no_such_inputs_says_why():
    example = torch.zeros(1, 1, 8, 16)
    assert objection(SDPBackend.MATH, example, True) is None
    assert objection(SDPBackend.FLASH_ATTENTION, example, True) is None
    assert "scaled_dot_product_attention" in objection(SDPBackend.CUDNN_ATTENTION, example, False)


def test_costs_are_those_of_the_paper():
    # DeiT-Tiny: 12 blocks, 3 heads of 64, 197 tokens (docs/papers.md 2); a multiply-add is two operations.
    case = {**CASE, "tokens": 197, "heads": 3, "head_dim": 64, "batch_size": 1}
    assert 12 * cost("softmax", case).flops / 2 == pytest.approx(178.83e6, rel=1e-4)
    assert 12 * cost("taylor", case).flops / 2 == pytest.approx(58.25e6, rel=1e-4)
    assert cost("taylor", case).bytes_moved == 4 * 3 * 197 * 64 * 4
    with_backward = cost("taylor", {**case, "backward": True})
    assert with_backward.flops == 3 * cost("taylor", case).flops
    assert with_backward.bytes_moved == 11 * 3 * 197 * 64 * 4


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
@pytest.mark.parametrize("backward", [False, True])
def test_compiled_contenders_pass_their_checks(backward):
    prepared = prepare("attention", {**CASE, "compile": True, "backward": backward})
    compiled = [contender for contender in prepared.contenders if contender.name.endswith("compiled")]
    assert len(compiled) == 4
    for contender in compiled:
        assert contender.check(prepared.inputs(0)).passed, contender.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backward", [False, True])
def test_on_a_gpu_the_kernels_of_sdpa_run_by_themselves_or_say_why_not(backward):
    case = {**CASE, "device": "cuda", "head_dim": 64, "backward": backward}
    prepared = prepare("attention", {**case, "dtype": "bfloat16"})
    names = {c.name for c in prepared.contenders}
    assert {"SDPA flash", "SDPA flash packed"} <= names
    assert ("SDPA cuDNN" in names) != ("SDPA cuDNN" in prepared.not_run)
    assert prepared.baselines["SDPA flash packed"] == "SDPA packed"
    for contender in prepared.contenders:
        assert contender.check(prepared.inputs(0)).passed, contender.name
    assert prepare("attention", case).not_run.keys() == {"SDPA flash", "SDPA cuDNN"}
