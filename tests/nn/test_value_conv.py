"""The convolution on V: where each token lands on the grid, what prefix and padded tokens do, and the grid object."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import Attention, Softmax, Taylor, TokenGrid, ValueConv


def convolution(kernel_size=3):
    conv = ValueConv(3 * 4, kernel_size)
    torch.nn.init.normal_(conv.conv.weight, generator=torch.Generator().manual_seed(0))
    return conv


def naive(conv, value, height, width, prefix):
    """Token by token: the sum over the neighbourhood of weight * value, channel (head, d) by channel."""
    out = torch.zeros_like(value)
    size = conv.conv.kernel_size[0]
    heads, width_v = value.shape[1], value.shape[3]
    weight = conv.conv.weight.view(heads, width_v, size, size)
    for y in range(height):
        for x in range(width):
            for dy in range(size):
                for dx in range(size):
                    sy, sx = y + dy - size // 2, x + dx - size // 2
                    if 0 <= sy < height and 0 <= sx < width:
                        out[:, :, prefix + y * width + x] += weight[..., dy, dx] * value[:, :, prefix + sy * width + sx]
    return out


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_against_token_by_token(prefix, kernel_size):
    conv = convolution(kernel_size)
    value = torch.randn(2, 3, prefix + 5 * 2, 4)
    torch.testing.assert_close(conv(value, 5, 2, prefix), naive(conv, value, 5, 2, prefix))
    assert not conv(value, 5, 2, prefix)[:, :, :prefix].any()


def test_starts_at_zero_and_learns():
    conv = ValueConv(12, 3)
    out = conv(torch.randn(2, 3, 10, 4), 5, 2)
    assert not out.any()
    out.sum().backward()
    assert conv.conv.weight.grad.abs().min() > 0


def test_padded_tokens_count_as_zeros():
    conv, value = convolution(), torch.randn(2, 3, 11, 4)
    keep = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    keep[1, ..., 7:] = False
    zeroed = value.clone()
    zeroed[1, :, 7:] = 0
    torch.testing.assert_close(conv(value, 5, 2, 1, keep), conv(zeroed, 5, 2, 1))


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 11, 11, dtype=torch.bool), torch.zeros(2, 1, 1, 11)])
def test_other_masks_are_refused(mask):
    with pytest.raises(UnsupportedError, match="key-padding"):
        convolution()(torch.randn(2, 3, 11, 4), 5, 2, 1, mask)


def test_causality_is_refused():
    with pytest.raises(UnsupportedError, match="look ahead"):
        convolution()(torch.randn(2, 3, 10, 4), 5, 2, is_causal=True)


def test_a_grid_that_does_not_fit_is_named():
    with pytest.raises(InputError, match="11 tokens do not fill a grid of 5 x 2 after 0 prefix tokens"):
        convolution()(torch.randn(2, 3, 11, 4), 5, 2)


@pytest.mark.parametrize("kernel_size", [0, 2, -3])
def test_kernels_are_odd(kernel_size):
    with pytest.raises(InputError, match=f"odd and positive, not {kernel_size}"):
        ValueConv(12, kernel_size)


@pytest.mark.parametrize("kernel_size", [(1, 2), (3, 0)])
def test_so_are_both_sides_of_a_kernel(kernel_size):
    with pytest.raises(InputError, match=re.escape(f"odd and positive, not {kernel_size}")):
        ValueConv(12, kernel_size)


def test_a_kernel_of_one_row_sees_one_row():
    conv = ValueConv(12, (1, 3))
    torch.nn.init.ones_(conv.conv.weight)
    value = torch.randn(2, 3, 10, 4)
    rows = torch.nn.functional.pad(value.reshape(2, 3, 2, 5, 4), (0, 0, 1, 1))
    expected = rows[:, :, :, :-2] + rows[:, :, :, 1:-1] + rows[:, :, :, 2:]
    torch.testing.assert_close(conv(value, 2, 5), expected.reshape(2, 3, 10, 4))
    assert ValueConv.multiplications((1, 3), 10, 4) == 3 * 10 * 4


def test_token_grid():
    grid = TokenGrid(num_prefix_tokens=2)
    with pytest.raises(InputError, match="token grid is unknown"):
        grid.size()
    grid.record(3, 7)
    assert grid.size() == copy.deepcopy(grid).size() == (3, 7, 2)


@pytest.mark.parametrize("core", [Softmax(), Taylor()], ids=repr)
def test_attention_module(core):
    torch.manual_seed(0)
    attention = Attention(12, 3, core=core, value_conv=3)
    x = torch.randn(2, 1 + 5 * 2, 12)
    q, k, v = attention.qkv(x).view(2, 11, 3, 3, 4).permute(2, 0, 3, 1, 4)
    merged = core(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
    plain = attention(x, grid=(5, 2), num_prefix_tokens=1)
    torch.testing.assert_close(plain, attention.proj(merged))  # the convolution starts at zero
    torch.nn.init.normal_(attention.value_conv.conv.weight)
    local = attention.value_conv(v, 5, 2, 1).transpose(1, 2).flatten(2)
    expected = F.linear(merged + local, attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(attention(x, grid=(5, 2), num_prefix_tokens=1), expected)
    with pytest.raises(InputError, match="needs the token grid"):
        attention(x)


def test_attention_module_needs_divisible_width():
    with pytest.raises(InputError, match="embed_dim 10 must be a multiple of num_heads 3"):
        Attention(10, 3)
