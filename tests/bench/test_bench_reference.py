import pytest
import torch
from torch.nn import functional as F

from vitrify.bench.reference import MAX_ROWS, check_attention, check_gradients, dense_attention, sample_rows
from vitrify.ops import taylor_attention

ATTEND = {"softmax": F.scaled_dot_product_attention, "taylor": taylor_attention}


def draw(dtype=torch.float32, tokens=300, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, tokens, width, generator=generator).to(dtype).unbind(0)


@pytest.mark.parametrize("kind", ["softmax", "taylor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_right_outputs_pass(kind, dtype):
    query, key, value = draw(dtype)
    check = check_attention(ATTEND[kind](query, key, value), query, key, value, scale=24**-0.5, kind=kind)
    assert check.passed, check


@pytest.mark.parametrize("kind", ["softmax", "taylor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_outputs_fail(kind, dtype):
    query, key, value = draw(dtype)
    check = check_attention(
        ATTEND[kind](query, key, value, scale=0.9 * 24**-0.5), query, key, value, scale=24**-0.5, kind=kind
    )
    assert not check.passed
    other = "softmax" if kind == "taylor" else "taylor"
    assert not check_attention(ATTEND[other](query, key, value), query, key, value, scale=24**-0.5, kind=kind).passed


def test_one_nan_fails_even_in_a_row_that_is_not_compared():
    query, key, value = draw(tokens=600)
    output = F.scaled_dot_product_attention(query, key, value)
    left_out = next(row for row in range(600) if row not in sample_rows(600, torch.device("cpu")))
    output[0, 0, left_out, 0] = float("nan")
    assert not check_attention(output, query, key, value, scale=24**-0.5, kind="softmax").passed


def test_sampled_rows_reach_both_ends():
    rows = sample_rows(5000, torch.device("cpu"))
    assert (rows[0], rows[-1], len(rows)) == (0, 4999, MAX_ROWS)
    assert len(rows.unique()) == MAX_ROWS
    assert sample_rows(3, torch.device("cpu")).tolist() == [0, 1, 2]


def test_taylor_is_the_first_order_expansion_of_softmax():
    query, key, value = (tensor.double() for tensor in draw())
    errors = []
    for scale in (1e-2, 1e-3):
        both = [dense_attention(query, key, value, scale=scale, kind=kind) for kind in ("softmax", "taylor")]
        errors.append((both[0] - both[1]).abs().max())
    assert errors[1] < errors[0] / 50  # the error is of second order: a tenth of the scale, a hundredth of it


@pytest.mark.parametrize("kind", ["softmax", "taylor"])
def test_gradients_are_summed_over_chunks_of_queries(kind, monkeypatch):
    inputs = [tensor.double().requires_grad_() for tensor in draw()]
    upstream = torch.randn(2, 3, 300, 24, generator=torch.Generator().manual_seed(1)).double()
    output = dense_attention(*inputs, scale=0.2, kind=kind)
    gradients = torch.autograd.grad(output, inputs, upstream)
    monkeypatch.setattr("vitrify.bench.reference.CHUNK", 128)
    leaves = [tensor.detach() for tensor in inputs]
    check = check_gradients(gradients, *leaves, upstream, scale=0.2, kind=kind)
    assert check.error < 1e-14
    assert "6 of 6 heads" in check.against


def test_a_wrong_gradient_in_the_first_or_last_head_is_found_and_a_nan_anywhere(monkeypatch):
    monkeypatch.setattr("vitrify.bench.reference.MAX_WEIGHTS", 1)
    leaves = [tensor.requires_grad_() for tensor in draw()]
    output = F.scaled_dot_product_attention(*leaves)
    right = torch.autograd.grad(output, leaves, output.detach())
    query, key, value = (tensor.detach() for tensor in leaves)

    def check(gradients):
        return check_gradients(gradients, query, key, value, output.detach(), scale=24**-0.5, kind="softmax")

    assert check(right).passed
    for batch, head in ((0, 0), (1, 2)):
        for index in range(3):
            wrong = [gradient.clone() for gradient in right]
            wrong[index][batch, head, 7, 5] += 0.01 * wrong[index].abs().max()
            assert not check(wrong).passed
    wrong = [gradient.clone() for gradient in right]
    wrong[0][0, 1, 0, 0] = float("nan")
    assert not check(wrong).passed
