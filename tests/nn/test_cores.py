"""The cores: what they compute, what they refuse, and the rule for a bias on the logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import Softmax, Taylor, TaylorSparse

SCALE = 0.3


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Each test compiles the same code objects, and Dynamo gives up after eight."""
    torch.compiler.reset()


def tensors(queries=11, keys=7, key_dim=6, value_dim=10, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (queries, key_dim), (keys, key_dim), (keys, value_dim)
    return [torch.randn(2, 3, *shape, dtype=dtype) for shape in shapes]


def padding():
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[0, ..., 4:] = False
    return keep


def softmax_of(q, k, v, bias=0.0, keep=None):
    scores = q @ k.mT * SCALE + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v


def expansion(q, k, v, bias=0.0, keep=None):
    """The quadratic evaluation: rows of 1 + x - mean(x), x = qk + b, divided by their sum, over the valid keys."""
    x = q @ k.mT * SCALE + bias
    keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep.expand_as(x)
    n = keep.sum(-1, keepdim=True)
    weights = torch.where(keep, 1 + x - (x * keep).sum(-1, keepdim=True) / n, 0)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale_on", ["query", "scores"])
@pytest.mark.parametrize("value_first", [True, False])
def test_softmax_paths_agree(fused, scale_on, value_first):
    q, k, v = tensors()
    core = Softmax(fused, scale_on, value_first=value_first)
    torch.testing.assert_close(core(q, k, v, scale=SCALE), softmax_of(q, k, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(core(q, k, v, padding(), scale=SCALE), softmax_of(q, k, v, keep=padding()))
    bias = torch.randn(3, 11, 7, dtype=q.dtype)
    torch.testing.assert_close(core(q, k, v, padding(), scale=SCALE, bias=bias), softmax_of(q, k, v, bias, padding()))


def test_softmax_leaves_the_scale_to_sdpa_when_asked():
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(Softmax(sdpa_scale=False)(q, k, v, scale=123.0), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_softmax_drops_weights(fused):
    q, k, v = tensors()
    core = Softmax(fused)
    torch.manual_seed(1)
    first = core(q, k, v, scale=SCALE, dropout_p=0.5)
    assert not torch.allclose(first, core(q, k, v, scale=SCALE, dropout_p=0.5))


def test_unfused_softmax_calls_the_given_dropout():
    q, k, v = tensors()
    seen = []
    dropout = nn.Dropout(0.0)
    dropout.register_forward_hook(lambda m, i, o: seen.append(o))
    Softmax(fused=False)(q, k, v, scale=SCALE, dropout=dropout)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 3, 11, dtype=q.dtype))


@pytest.mark.parametrize("keep", [None, padding()], ids=["all", "padded"])
def test_taylor_is_the_expansion(keep):
    q, k, v = tensors()
    torch.testing.assert_close(Taylor()(q, k, v, keep, scale=SCALE), expansion(q, k, v, keep=keep), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize("batched", [True, False])
def test_bias_is_the_expansion_of_qk_plus_b(keep, batched):
    q, k, v = tensors()
    bias = torch.randn(*((2,) if batched else ()), 3, 11, 7, dtype=q.dtype)
    actual = Taylor()(q, k, v, keep, scale=SCALE, bias=bias)
    torch.testing.assert_close(actual, expansion(q, k, v, bias, keep), rtol=0, atol=1e-12)
    # A row of the bias that is constant over the keys is no bias.
    shifted = Taylor()(q, k, v, keep, scale=SCALE, bias=bias + torch.randn(3, 11, 1, dtype=q.dtype))
    torch.testing.assert_close(actual, shifted, rtol=0, atol=1e-12)


def test_bias_can_be_dropped():
    q, k, v = tensors()
    bias = torch.randn(3, 11, 7, dtype=q.dtype)
    assert torch.equal(Taylor(bias="drop")(q, k, v, scale=SCALE, bias=bias), Taylor()(q, k, v, scale=SCALE))


@pytest.mark.parametrize("keep", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize("biased", [True, False])
def test_threshold_0_is_softmax_and_above_1_taylor(keep, biased):
    q, k, v = tensors()
    bias = torch.randn(3, 11, 7, dtype=q.dtype) if biased else None
    core = TaylorSparse(0.0)
    out = core(q, k, v, keep, scale=SCALE, bias=bias)
    expected = softmax_of(q, k, v, 0.0 if bias is None else bias, keep)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert core.density == 1
    core.set_threshold(1.01)
    out = core(q, k, v, keep, scale=SCALE, bias=bias)
    torch.testing.assert_close(out, Taylor()(q, k, v, keep, scale=SCALE, bias=bias), rtol=0, atol=1e-12)
    assert core.density == 0


@pytest.mark.parametrize("keep", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize("biased", [True, False])
def test_threshold_0_is_softmax_in_float32_beside_large_offsets(keep, biased):
    q, k, v = tensors()
    k, v = k + 100, v + 100
    bias = torch.randn(3, 11, 7, dtype=q.dtype) if biased else torch.zeros(3, 11, 7, dtype=q.dtype)
    truth = softmax_of(q, k, v, bias, keep)
    narrow = [t.float() for t in (q, k, v)]
    out = TaylorSparse(0.0)(*narrow, keep, scale=SCALE, bias=bias.float() if biased else None)
    plain = Softmax(fused=False)(*narrow, keep, scale=SCALE, bias=bias.float())
    assert (out - truth).abs().max() <= 3 * (plain - truth).abs().max()


@pytest.mark.parametrize("biased", [True, False])
def test_sparse_part_exists_in_training_only(biased):
    q, k, v = tensors()
    bias = torch.randn(3, 11, 7, dtype=q.dtype) if biased else None
    core = TaylorSparse(0.15)
    trained = core(q, k, v, scale=SCALE, bias=bias)
    density = core.density.clone()
    assert 0 < density < 1
    core.eval()
    taylor = Taylor()(q, k, v, scale=SCALE, bias=bias)
    assert torch.equal(core(q, k, v, scale=SCALE, bias=bias), taylor)
    assert not torch.allclose(trained, taylor)
    assert torch.equal(core.density, density)  # evaluation does not overwrite what training saw


@pytest.mark.parametrize("keep", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_sparse_only_is_softmax_over_the_kept_entries(train, biased, keep):
    q, k, v = tensors()
    bias = torch.randn(3, 11, 7, dtype=q.dtype) if biased else None
    core = TaylorSparse(0.0, low_rank=False).train(train)
    expected = softmax_of(q, k, v, 0.0 if bias is None else bias, keep)
    torch.testing.assert_close(core(q, k, v, keep, scale=SCALE, bias=bias), expected, rtol=0, atol=1e-12)
    core.set_threshold(0.14)
    out = core(q, k, v, keep, scale=SCALE, bias=bias)
    assert not torch.allclose(out, expected)
    # Rows of kept weights sum to one: constant values come back, wherever a row keeps anything.
    ones = core(q, k, torch.ones_like(v), keep, scale=SCALE, bias=bias)
    torch.testing.assert_close(ones[ones > 0.5], torch.ones_like(ones[ones > 0.5]))
    core.set_threshold(1.5)  # above every probability
    assert torch.equal(core(q, k, v, keep, scale=SCALE, bias=bias), torch.zeros_like(expected))


@pytest.mark.parametrize(
    "core", [Taylor(), TaylorSparse(0.1), TaylorSparse(0.1).eval(), Taylor(squares=True)], ids=repr
)
def test_linear_cores_refuse_what_they_cannot_carry(core):
    q, k, v = tensors(queries=7)
    with pytest.raises(UnsupportedError, match="is_causal"):
        core(q, k, v, scale=SCALE, is_causal=True)
    with pytest.raises(UnsupportedError, match=r"dropout 0\.1"):
        core(q, k, v, scale=SCALE, dropout_p=0.1)
    with pytest.raises(UnsupportedError, match="key-padding"):
        core(q, k, v, torch.zeros(7, 7), scale=SCALE)
    with pytest.raises(UnsupportedError, match="key-padding"):
        core(q, k, v, torch.ones(2, 1, 7, 7, dtype=torch.bool), scale=SCALE)


def test_squares_refuse_a_bias():
    q, k, v = tensors()
    assert not torch.allclose(Taylor(squares=True)(q, k, v, scale=SCALE), Taylor()(q, k, v, scale=SCALE))
    with pytest.raises(UnsupportedError, match="squares"):
        Taylor(squares=True)(q, k, v, scale=SCALE, bias=torch.zeros(3, 11, 7))


def test_cores_add_no_state():
    for core in (Softmax(), Taylor(), TaylorSparse(0.1)):
        assert not core.state_dict()
        assert not list(core.parameters())


def test_buffers_stay_float32_and_survive_to_empty():
    core = TaylorSparse(0.002).to(torch.bfloat16)
    assert core.threshold.dtype == core.density.dtype == torch.float32
    assert core.threshold == torch.tensor(0.002)
    with torch.device("meta"):
        core = TaylorSparse(0.002)
    core.to_empty(device="cpu")
    assert core.threshold == torch.tensor(0.002)
    core.set_threshold(0.25)
    assert copy.deepcopy(core).threshold == 0.25
    assert "0.25" in repr(core)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_thresholds_are_probabilities(threshold):
    with pytest.raises(InputError, match=f"threshold must be a probability.* not {threshold}"):
        TaylorSparse(threshold)


def test_multiplications_are_those_of_the_matmuls():
    q, k, v = tensors()
    sizes = (11, 7, 6, 10)
    assert Softmax().multiplications(*sizes) == 11 * 7 * 6 + 11 * 7 * 10
    assert Taylor().multiplications(*sizes) == 7 * 6 * 10 + 11 * 6 * 10
    assert TaylorSparse(0.1).multiplications(*sizes) == Taylor().multiplications(*sizes)
    assert TaylorSparse(0.1, low_rank=False).multiplications(*sizes) == Softmax().multiplications(*sizes)
    with FlopCounterMode(display=False) as counter:
        Softmax(fused=False)(q, k, v, scale=SCALE)
    assert counter.get_total_flops() == 2 * 6 * Softmax().multiplications(*sizes)  # 2 flops each, 2 images x 3 heads
    assert Taylor(squares=True).multiplications(*sizes) == 2 * Taylor().multiplications(*sizes)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("low_rank", [True, False])
def test_compiles_whole_and_records_density(train, low_rank):
    q, k, v = tensors(dtype=torch.float32)
    core = TaylorSparse(0.15, low_rank=low_rank).train(train)
    expected = core(q, k, v, scale=SCALE)
    density = core.density.clone()
    core.density.fill_(float("nan"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(core, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(q, k, v, scale=SCALE), expected)
    assert torch.equal(core.density, density) if train else core.density.isnan()
    core.set_threshold(0.0)
    if train:  # the threshold is read when the graph runs, not when it is traced
        torch.testing.assert_close(compiled(q, k, v, scale=SCALE), softmax_of(q, k, v))
        assert counter.frame_count == 1


@pytest.mark.parametrize("core", [Taylor(), TaylorSparse(0.15), TaylorSparse(0.15, low_rank=False)], ids=repr)
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_reach_all_inputs(core, biased):
    q, k, v = (t.requires_grad_() for t in tensors())
    bias = torch.randn(3, 11, 7, dtype=q.dtype, requires_grad=True) if biased else None
    core(q, k, v, scale=SCALE, bias=bias).square().sum().backward()
    for tensor in (q, k, v, *([bias] if biased else [])):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 1e-6
