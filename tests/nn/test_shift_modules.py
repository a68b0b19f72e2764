"""ShiftLinear and ShiftConv2d: made in place or as a copy, trained, cast, packed, saved and loaded."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import ShiftConv2d, ShiftLinear
from vitrify.ops import shift_ste

FORMATS = [(3, "ps"), (4, "ps"), (4, "q"), (5, "ps"), (6, "q")]
formats = pytest.mark.parametrize(("bits", "variant"), FORMATS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(width: int = 13, out: int = 6, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(width, out, bias)
    nn.init.normal_(layer.weight, 0, 0.1, generator=generator())
    return layer


def conv() -> nn.Conv2d:
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
    nn.init.normal_(layer.weight, 0, 0.1, generator=generator())
    return layer


def made(kind: str, bits: int = 4, variant: str = "ps") -> tuple[nn.Module, torch.Tensor]:
    """Return a shift layer and an input for it."""
    if kind == "linear":
        return ShiftLinear.adopt_(linear(), bits, variant), torch.randn(3, 5, 13, generator=generator(1))
    return ShiftConv2d.adopt_(conv(), bits, variant), torch.randn(2, 6, 9, 9, generator=generator(1))


kinds = pytest.mark.parametrize("kind", ["linear", "conv"])


def test_adopt_keeps_the_module_and_its_parameters():
    layer = linear()
    called = []
    layer.register_forward_hook(lambda *_: called.append(True))
    layer.bias.requires_grad_(False)
    weight, bias, keys = layer.weight, layer.bias, list(layer.state_dict())
    shift = ShiftLinear.adopt_(layer.eval(), 5, "q")
    assert shift is layer
    assert isinstance(shift, nn.Linear)
    assert shift.weight is weight
    assert shift.bias is bias
    assert list(shift.state_dict()) == keys
    assert (shift.bits, shift.variant, shift.packed, shift.training) == (5, "q", False, False)
    x = torch.randn(2, 13, generator=generator(1))
    assert torch.equal(shift(x), F.linear(x, shift_ste(weight, 5, "q"), bias))
    assert called
    assert "bits=5, variant='q', packed=False" in repr(shift)


@formats
def test_from_linear_copies_and_tells_the_error(bits, variant):
    source = linear()
    before = source.weight.detach().clone()
    state = torch.get_rng_state()
    shift, error = ShiftLinear.from_linear(source, bits, variant)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(source) is nn.Linear
    assert shift.weight is not source.weight
    assert torch.equal(shift.weight, before)
    assert torch.equal(shift.bias, source.bias)
    expected = (shift.decoded_weight() - before).norm() / before.norm()
    assert error == pytest.approx(expected.item(), rel=1e-5) == shift.quantization_error()
    assert 0.05 < error < 0.35
    with torch.no_grad():
        shift.weight.copy_(shift.decoded_weight())
    assert shift.quantization_error() == 0


def test_from_linear_keeps_dtype_mode_and_flags():
    source = linear(bias=False).to(torch.bfloat16).eval().requires_grad_(False)
    shift, _ = ShiftLinear.from_linear(source)
    assert (shift.weight.dtype, shift.weight.requires_grad, shift.training, shift.bias) == (
        torch.bfloat16,
        False,
        False,
        None,
    )


@kinds
@formats
def test_packed_outputs_are_the_same_bits(bits, variant, kind):
    shift, x = made(kind, bits, variant)
    weight, expected = shift.decoded_weight(), shift(x)
    assert shift.pack_() is shift
    assert shift.packed
    assert shift.weight is None
    assert torch.equal(shift(x), expected)
    assert torch.equal(shift.decoded_weight(), weight)
    assert sorted(shift.state_dict()) == ["bias", "codes", "exponent"]
    codes = shift.codes
    assert shift.pack_().codes is codes
    assert codes.shape == (weight.shape[0], (weight[0].numel() + 1) // 2 if bits <= 4 else weight[0].numel())


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_packed_outputs_are_the_same_bits_in_other_dtypes(dtype, kind):
    shift, x = made(kind)
    shift.to(dtype)
    expected = shift(x.to(dtype))
    assert expected.dtype == dtype
    assert torch.equal(shift.pack_()(x.to(dtype)), expected)
    assert shift.codes.dtype == torch.uint8


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 6])
def test_autocast(bits, dtype, kind):
    shift, x = made(kind, bits)
    with torch.autocast("cpu", dtype):
        out = shift(x)
    out.float().square().sum().backward()
    assert out.dtype == dtype
    assert shift.weight.grad.dtype == torch.float32
    assert shift.weight.grad.abs().sum() > 0
    shift.pack_()
    with torch.autocast("cpu", dtype):
        assert torch.equal(shift(x), out)
        assert torch.equal(shift(x.to(dtype)), out)  # the bias is cast where the input needs no cast


@kinds
def test_packing_after_a_cast_or_before_is_the_same(kind):
    shift, x = made(kind)
    early, late = copy.deepcopy(shift).pack_().to(torch.bfloat16), copy.deepcopy(shift.to(torch.bfloat16)).pack_()
    assert early.bias.dtype == torch.bfloat16
    assert early(x.bfloat16()).dtype == late(x.bfloat16()).dtype == torch.bfloat16
    again = copy.deepcopy(early)
    assert again.codes.data_ptr() != early.codes.data_ptr()
    assert torch.equal(again(x.bfloat16()), early(x.bfloat16()))


@kinds
def test_state_dict_round_trip_into_a_fresh_layer(kind):
    shift, x = made(kind, 5, "q")
    expected = shift.pack_()(x)
    file = io.BytesIO()
    torch.save(shift.state_dict(), file)
    file.seek(0)
    fresh = (
        ShiftLinear.adopt_(nn.Linear(13, 6), 5, "q") if kind == "linear" else ShiftConv2d.adopt_(conv(), 5, "q")
    ).pack_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), expected)


def test_a_packed_layer_on_meta_takes_a_state_dict_by_assignment():
    with torch.device("meta"):
        fresh = ShiftLinear.adopt_(nn.Linear(13, 6)).pack_()
    assert fresh.codes.is_meta
    shift, x = made("linear")
    fresh.load_state_dict(shift.pack_().state_dict(), assign=True)
    assert torch.equal(fresh(x), shift(x))


@kinds
def test_training_a_packed_layer_trains_its_bias_only(kind):
    shift, x = made(kind)
    shift.pack_()
    assert [name for name, _ in shift.named_parameters()] == ["bias"]
    x.requires_grad_()
    shift(x).square().sum().backward()
    assert shift.bias.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


@kinds
def test_training_moves_the_latent_weight_across_levels(kind):
    shift, x = made(kind)
    target = torch.randn(shift(x).shape, generator=generator(2))
    optimizer = torch.optim.SGD(shift.parameters(), lr=0.1)
    before, first = shift.decoded_weight(), F.mse_loss(shift(x), target).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(shift(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * first
    assert not torch.equal(shift.decoded_weight(), before)


@kinds
def test_compile_and_fx(kind):
    for pack in (False, True):
        shift, x = made(kind)
        if pack:
            shift.pack_()
        assert torch.equal(torch.compile(shift, fullgraph=True, backend="aot_eager")(x), shift(x))
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(shift))(x), shift(x))


def test_quantization_error_at_the_edges():
    layer = linear()
    nn.init.zeros_(layer.weight)
    assert ShiftLinear.adopt_(layer).quantization_error() == 0
    with pytest.raises(UnsupportedError, match=r"a packed layer has no latent weight .* before pack_"):
        layer.pack_().quantization_error()
    with torch.device("meta"):
        meta = nn.Linear(3, 2)
    assert ShiftLinear.from_linear(meta)[1] != ShiftLinear.from_linear(meta)[1]  # NaN


class Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ShiftLinear.adopt_(Custom(3, 2)), UnsupportedError, "made from nn.Linear, not from Custom"),
        (lambda: ShiftLinear.from_linear(Custom(3, 2)), UnsupportedError, "made from nn.Linear, not from Custom"),
        (lambda: ShiftLinear.adopt_(conv()), UnsupportedError, "made from nn.Linear, not from Conv2d"),
        (lambda: ShiftConv2d.adopt_(nn.Conv1d(3, 2, 1)), UnsupportedError, "made from nn.Conv2d, not from Conv1d"),
        (lambda: ShiftLinear.adopt_(ShiftLinear.adopt_(linear())), UnsupportedError, "not from ShiftLinear"),
        (lambda: ShiftLinear.adopt_(linear(), bits=8), InputError, "from 3 to 6 .* not 8"),
        (lambda: ShiftLinear.adopt_(linear(), variant="p"), InputError, "unknown shift variant 'p'"),
    ],
)
def test_what_cannot_become_a_shift_layer(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_module_is_untouched():
    layer = linear()
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="weight holds NaN"):
        ShiftLinear.adopt_(layer)
    assert type(layer) is nn.Linear
    assert "bits" not in vars(layer)
    normed = nn.utils.parametrizations.weight_norm(linear())
    with pytest.raises(UnsupportedError, match="not from ParametrizedLinear"):
        ShiftLinear.adopt_(normed)


def test_float16_is_refused_before_anything_changes():
    layer = linear()
    with torch.no_grad():
        layer.weight[0, 0] = 70000.0
    shift = ShiftLinear.adopt_(layer)
    shift.pack_()
    with pytest.raises(InputError, match=r"2\^16 overflows float16.* keep this layer in bfloat16 or float32"):
        shift.half()
    assert shift.bias.dtype == torch.float32
    assert shift.to(torch.bfloat16).bias.dtype == torch.bfloat16
    small = ShiftLinear.adopt_(linear(), bits=6)
    with torch.no_grad():
        small.weight[0, :2] = torch.tensor([1.0, 2.0**-28])
    with pytest.raises(InputError, match=r"2\^-28 would become 0 in float16"):
        nn.Sequential(small.pack_()).half()


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_rounded_activations_are_trained_as_they_run(activations):
    source = linear()
    layer = ShiftLinear.adopt_(copy.deepcopy(source), activations=activations)
    x = torch.randn(3, 5, 13, generator=generator(1)).requires_grad_()
    out = layer(x)
    float_out = ShiftLinear.from_linear(source)[0](x)
    assert 1e-4 < ((out - float_out).norm() / float_out.norm()).item() < 0.06
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0
    assert f"activations='{activations}'" in repr(layer)
    copied, error = ShiftLinear.from_linear(source, activations=activations)
    assert (copied.activations, error) == (activations, layer.quantization_error())
    torch.testing.assert_close(layer.pack_()(x), out, rtol=1e-5, atol=1e-6)
    half = copy.deepcopy(layer).to(torch.bfloat16)(x.detach().bfloat16())
    torch.testing.assert_close(half.float(), out, rtol=0.05, atol=0.02)


def test_activations_leave_with_the_layer():
    layer = ShiftLinear.adopt_(linear(), activations="int8")
    assert type(layer.restore_()) is nn.Linear
    assert "activations" not in vars(layer)
    with pytest.raises(InputError, match="unknown activations 'int4'"):
        ShiftLinear.adopt_(layer, activations="int4")
    assert type(layer) is nn.Linear
    expected = ShiftLinear.from_linear(layer)[0]
    old = ShiftLinear.adopt_(layer)
    del old.activations  # a layer pickled before there were any
    x = torch.randn(2, 13, generator=generator(1))
    assert torch.equal(old(x), expected(x))
