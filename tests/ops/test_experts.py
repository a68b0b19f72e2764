"""Routing, dispatch and balancing: each token gets its expert's row, and the losses mean what they say."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrify.errors import InputError
from vitrify.ops.experts import balance_losses, dispatch, route
from vitrify.ops.experts.reference import dense


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linears(num_experts, width_in=5, width_out=3):
    matrices = [randn(width_in, width_out, seed=10 + e) for e in range(num_experts)]
    return [lambda x, m=m: x @ m for m in matrices]


# --- route


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gate_is_one_and_teaches_log_p(dtype):
    logits = (randn(50, 3) * 4).to(dtype).requires_grad_()
    index, gate = route(logits)
    assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(gate, torch.ones_like(gate))
    assert torch.equal(index, logits.argmax(-1))
    slope = randn(50).to(gate.dtype)
    (found,) = torch.autograd.grad((gate * slope).sum(), logits)
    wide = logits.detach().to(gate.dtype).requires_grad_()
    log_p = wide.log_softmax(-1).gather(1, index[:, None])[:, 0]
    (expected,) = torch.autograd.grad((log_p * slope).sum(), wide)
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5 if dtype.itemsize >= 4 else 1e-2, atol=1e-5)
    assert found.abs().max() > 0.1


def test_huge_logits_give_no_nan_and_ties_go_to_the_first():
    index, gate = route(torch.tensor([[6e4, -6e4], [1.0, 1.0]], dtype=torch.float16))
    assert index.tolist() == [0, 0]
    assert gate.tolist() == [1, 1]


# --- dispatch


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4).flatmap(lambda e: st.tuples(st.just(e), st.lists(st.integers(0, e - 1), max_size=20))))
def test_dispatch_gives_each_token_its_experts_row(drawn):
    num_experts, choices = drawn
    index, x, experts = torch.tensor(choices, dtype=torch.int64), randn(len(choices), 5), linears(num_experts)
    expected = torch.stack([experts[e](x[t]) for t, e in enumerate(choices)]) if choices else x.new_zeros(0, 3)
    torch.testing.assert_close(dispatch(x, index, experts), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dense(x, index, experts), expected, rtol=1e-13, atol=1e-13)


def test_each_expert_sees_its_own_tokens_only_in_their_order():
    x, index, seen = randn(6, 2), torch.tensor([2, 0, 2, 0, 0, 2]), {}

    def expert(number):
        def run(part):
            seen[number] = part
            return part

        return run

    assert torch.equal(dispatch(x, index, [expert(e) for e in range(3)]), x)
    assert torch.equal(seen[0], x[[1, 3, 4]])
    assert seen[1].shape == (0, 2)
    assert torch.equal(seen[2], x[[0, 2, 5]])


def test_results_do_not_depend_on_token_order():
    x, index, order = randn(100, 5), torch.arange(100) % 3, torch.randperm(100)
    out, shuffled = dispatch(x, index, linears(3)), dispatch(x[order], index[order], linears(3))
    torch.testing.assert_close(shuffled, out[order], rtol=1e-13, atol=1e-13)


def test_leading_dimensions_and_a_single_token():
    x, index = randn(2, 4, 5), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    flat = dispatch(x.reshape(8, 5), index.reshape(8), linears(2))
    assert torch.equal(dispatch(x, index, linears(2)), flat.reshape(2, 4, 3))
    torch.testing.assert_close(dispatch(x[0, 1], index[0, 1], linears(2)), flat[1], rtol=1e-13, atol=1e-13)


def test_gradients_equal_the_definitions_and_reach_an_expert_without_tokens():
    index, layers = torch.tensor([0, 2, 0, 2, 2]), [nn.Linear(5, 3).double() for _ in range(3)]
    x = randn(5, 5).requires_grad_()
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    slope = randn(5, 3, seed=1)
    found = torch.autograd.grad((dispatch(x, index, layers) * slope).sum(), inputs)
    expected = torch.autograd.grad((dense(x, index, layers) * slope).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert found[3].abs().max() == 0
    assert found[5].abs().max() > 0


def test_compiled_without_a_graph_break_and_on_tensors_without_values():
    x, index, experts = randn(7, 5), torch.tensor([0, 1, 1, 0, 0, 1, 0]), linears(2)
    compiled = torch.compile(lambda x, i: dispatch(x, i, experts), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, index), dispatch(x, index, experts), rtol=1e-13, atol=1e-13)
    layers = [nn.Linear(5, 3, device="meta"), nn.Linear(5, 3, device="meta")]
    assert dispatch(x.float().to("meta"), index.to("meta"), layers).shape == (7, 3)
    with FakeTensorMode():
        assert dispatch(torch.empty(7, 5), torch.zeros(7, dtype=torch.int64), [nn.Linear(5, 3)] * 2).shape == (7, 3)


def test_dispatch_names_what_does_not_fit():
    with pytest.raises(InputError, match=r"index \(4,\) must have one entry per token of x \(5, 5\)"):
        dispatch(randn(5, 5), torch.zeros(4, dtype=torch.int64), linears(2))
    with pytest.raises(InputError, match="index 2 names no expert: there are 2"):
        dispatch(randn(3, 5), torch.tensor([0, 2, 1]), linears(2))


# --- balance


def scv(values):
    return statistics.pvariance(values) / statistics.fmean(values) ** 2


def test_the_smooth_losses_equal_the_papers_formulas():
    p, alpha, noise = randn(9, 3).softmax(1), (3.0, 1.0, 2.0), 0.2
    importance, load = balance_losses(p, alpha, noise, load="smooth")

    def beats(row, i):
        gap = row[i] - max(row[j] for j in range(3) if j != i)
        return 0.5 * (1 + math.erf(gap / noise / 2**0.5))

    rows = p.tolist()
    torch.testing.assert_close(importance.item(), scv([alpha[i] * sum(r[i] for r in rows) for i in range(3)]))
    torch.testing.assert_close(load.item(), scv([alpha[i] * sum(beats(r, i) for r in rows) for i in range(3)]))


def test_the_hard_losses_count_dispatched_tokens():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.4, 0.6], [0.4, 0.6]])
    for loss in balance_losses(p, (6, 4)):
        assert loss.item() == pytest.approx(0, abs=1e-7)
    for loss in balance_losses(p, (1, 1)):
        assert loss.item() == pytest.approx(scv([2, 3]))


def test_the_papers_loss_is_content_with_a_router_that_never_multiplies():
    p = torch.tensor([[0.437, 0.563]]).expand(100, 2)
    smooth, hard = (sum(balance_losses(p, (6, 4), load=load)).item() for load in ("smooth", "hard"))
    assert smooth < 0.01
    assert hard == pytest.approx(2)


@pytest.mark.parametrize("load", ["hard", "smooth"])
def test_gradients_are_those_of_finite_values_even_at_certainty(load):
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    sum(balance_losses(p, (6, 4), load=load)).backward()
    assert p.grad.isfinite().all()
    assert p.grad[:, 0].min() > 0  # two in three tokens multiply: too many


def trained_share(load, *, std=0.02, lr=1e-3, alpha=(6.0, 4.0), steps=400):
    """Hard share of the first expert over the last 100 steps, of a router trained on random tokens by the losses."""
    generator = torch.Generator().manual_seed(0)
    weight = (std * torch.randn(len(alpha), 32, generator=generator)).requires_grad_()
    bias = torch.zeros(len(alpha), requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0)
    shares = []
    for _ in range(steps):
        p = torch.nn.functional.linear(torch.randn(512, 32, generator=generator), weight, bias).softmax(1)
        optimizer.zero_grad()
        sum(balance_losses(p, alpha, load=load)).backward()
        optimizer.step()
        shares.append(torch.bincount(p.argmax(1), minlength=len(alpha)) / 512)
    return torch.stack(shares[-100:]).mean(0)


def test_hard_losses_reach_forty_sixty_where_smooth_ones_do_not():
    assert trained_share("hard")[0].item() == pytest.approx(0.4, abs=0.01)
    assert trained_share("smooth")[0].item() < 0.2


def test_hard_losses_balance_three_experts():
    share = trained_share("hard", alpha=(6.0, 4.0, 3.0), lr=1e-2)
    expected = torch.tensor([1 / 6, 1 / 4, 1 / 3]) / (1 / 6 + 1 / 4 + 1 / 3)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)


def test_bad_numbers_are_named():
    p = torch.full((4, 2), 0.5)
    for arguments, message in (
        ((p[0], (6, 4)), r"tokens, experts.*\(2,\)"),
        ((p.half(), (6, 4)), "float32 or float64, not torch.float16"),
        ((p, (6, 4, 1)), "3 latencies for 2 experts"),
        ((p, (6, 0)), "positive and finite"),
        ((p, (6, float("nan"))), "positive and finite"),
        ((p, (6, 4), 0.0), "positive, not 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            balance_losses(*arguments)
    with pytest.raises(InputError, match="did you mean 'smooth'"):
        balance_losses(p, (6, 4), load="smoth")
