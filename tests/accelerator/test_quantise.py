"""Whole models at a hardware's widths: layers and cores against integer arithmetic, and what is said about them."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import vitrify
from vitrify.accelerator.hardware import load
from vitrify.accelerator.quantise import Quantised, form_of, quantise_, widths_of
from vitrify.accelerator.rounded import FixedTaylor, RoundedSoftmax, rounded
from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import IntLinear, ShiftConv2d, ShiftLinear
from vitrify.nn.attention import named_cores
from vitrify.nn.cores import Softmax, Taylor
from vitrify.ops.fixed_point import quantise
from vitrify.ops.taylor.widths import Widths

torch.set_num_threads(1)
FINE = Widths(activations=16, weights=16, partial=40, context=16, fraction=16)


def images(count=4, size=28, channels=1, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def vit(recipe=None, **options):
    """Return the small ViT with random weights, wide enough apart to tell layers from each other."""
    torch.manual_seed(0)
    model = timm.create_model("vit_mini_patch2_28", depth=2, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.2)
    if recipe is not None:
        vitrify.convert_(model, recipe)
    return model


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module", autouse=True)
def _registered():
    vitrify.create_model("vit_mini_patch2_28")  # registers it with timm


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_linear_layer_is_a_product_of_integers(bits):
    x = torch.randn(5, 7, 33, generator=torch.Generator().manual_seed(1))
    model = net(nn.Linear(33, 12))
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    report = quantise_(model, Widths(activations=bits, weights=bits), [x])
    unit = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    units = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    codes, weights = (
        quantise(x, unit, bits),
        torch.stack([quantise(w, float(u), bits) for w, u in zip(weight, units, strict=True)]),
    )
    assert codes.abs().max() == weights.abs().max() == 2 ** (bits - 1) - 1
    torch.testing.assert_close(model(x), (codes @ weights.T) * (unit * units) + bias, rtol=1e-5, atol=1e-5)
    assert report.layers == {"0": f"multiply, {bits}-bit weights"}


@torch.no_grad()
def test_a_convolution_is_one_too():
    x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    model = net(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2))
    conv = copy.deepcopy(model[0])
    quantise_(model, Widths(), [x])
    unit = float(x.abs().max()) / 127
    units = conv.weight.abs().amax((1, 2, 3)) / 127
    conv.weight.copy_(torch.stack([quantise(w, float(u), 8) for w, u in zip(conv.weight, units, strict=True)]))
    bias, conv.bias = conv.bias.clone(), None
    sums = conv(quantise(x, unit, 8).float())
    assert torch.equal(sums, sums.round())
    expected = sums * (unit * units)[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_shift_layers_keep_their_codes(packed):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    conv, linear = ShiftConv2d.adopt_(nn.Conv2d(3, 4, 1)), ShiftLinear.adopt_(nn.Linear(8, 5), 5, "q", "int8")
    model = net(conv, linear)
    if packed:
        vitrify.pack_(model)
    weights = [layer.decoded_weight().clone() for layer in model]
    report = quantise_(model, Widths(), [x])
    assert list(report.layers.values()) == ["shift, 4-bit codes", "shift, 5-bit codes"]
    for layer, weight in zip(model, weights, strict=True):
        assert torch.equal(layer.decoded_weight(), weight)
    middle = nn.functional.conv2d(rounded(x, float(x.abs().max()) / 127, 8), weights[0], conv.bias)
    plain = nn.functional.conv2d(x, weights[0], conv.bias)
    last = rounded(middle, float(plain.abs().max()) / 127, 8) @ weights[1].T + linear.bias
    torch.testing.assert_close(model(x), last, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_integer_layers_keep_their_own_width():
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    model = net(IntLinear.adopt_(nn.Linear(16, 4), 4))
    weight = model[0].weight.clone()
    assert quantise_(model, Widths(), [x]).layers == {"0": "multiply, 4-bit weights"}
    step = weight.abs().amax(1, keepdim=True) / 7
    expected = rounded(x, float(x.abs().max()) / 127, 8) @ ((weight / step).round() * step).T + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["algorithm1", "affine"])
@torch.no_grad()
def test_a_taylor_core_is_its_integer_schedule(form):
    model, x = vit(vitrify.recipes.vitality()), images()
    report = quantise_(model, Widths(), [x], form)
    assert set(report.cores.values()) == {f"Taylor attention, {form}"}
    cores = {name: core for name, core in named_cores(model).items() if isinstance(core, FixedTaylor)}
    assert list(cores) == list(report.cores) == ["blocks.0.attn.core", "blocks.1.attn.core"]
    seen = {}
    core = cores["blocks.1.attn.core"]
    core.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output))
    model(x)
    schedule = core.schedule
    codes = schedule.quantise(*seen["args"][:3])
    assert torch.equal(seen["output"], (schedule(*codes) * schedule.units.output).float())
    assert schedule.tokens == 196
    # Calibrated on these very images: next to nothing saturates.
    assert [int(c.abs().max()) in range(120, 129) for c in codes] == [True] * 3


@torch.no_grad()
def test_softmax_rounds_all_operands_and_weights_sum_to_one():
    query, key, value = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(1)).unbind()
    core = RoundedSoftmax(Softmax(), tuple(float(t.abs().max()) for t in (query, key, value)), Widths())
    units = [float(t.abs().max()) / 127 for t in (query, key, value)]
    q, k, v = (quantise(t, unit, 8) for t, unit in zip((query, key, value), units, strict=True))
    scores = (q @ k.mT).double() * units[0] * units[1] * 0.3
    powers = ((scores - scores.amax(-1, keepdim=True)).exp() * 127 + 0.5).floor()
    expected = (powers @ (v * units[2]).double()) / powers.sum(-1, keepdim=True)
    torch.testing.assert_close(core(query, key, value, scale=0.3).double(), expected, rtol=0, atol=0.02)
    assert (core(query, key, value, scale=0.3).double() - expected).abs().mean() < 1e-4
    mask = torch.arange(9) < 4
    masked = core(query, key, value, mask[None, None, None], scale=0.3)
    torch.testing.assert_close(masked, core(query, key[:, :, :4], value[:, :, :4], scale=0.3))


@pytest.mark.parametrize("recipe", ["softmax", "vitality", "vitrify", "shiftaddvit", "sparse"])
@torch.no_grad()
def test_wider_numbers_come_nearer_to_float(recipe):
    model, x = vit(vitrify.recipes.get(recipe)), images(8)
    logits, errors = model(x), []
    for widths in (Widths(activations=5, weights=5, context=5), Widths(), FINE):
        model_ = copy.deepcopy(model)
        report = quantise_(model_, widths, [x])
        errors.append(float((model_(x) - logits).norm() / logits.norm()))
        assert not report.floats
    # shiftaddvit: binary codes flip where a number is next to its threshold, however fine the numbers are.
    assert (1 if recipe == "shiftaddvit" else 10) * errors[2] < errors[1] < errors[0]


SMALL = {
    "deit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "levit_128s": {},
    "mobilevit_xxs": {},
}


QUICK = {("deit_tiny_patch16_224", None), ("pvt_v2_b0", "vitrify"), ("mobilevit_xxs", None)}
CASES = [
    pytest.param(name, recipe, marks=() if (name, recipe) in QUICK else pytest.mark.slow)
    for name in SMALL
    for recipe in (None, "taylor", "vitrify")
]


@pytest.mark.parametrize(("name", "recipe"), CASES)
@torch.no_grad()
def test_other_architectures(name, recipe):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name]).eval()
    size = 64 if "deit" in name or "pvt" in name else model.pretrained_cfg["input_size"][1]
    if recipe is not None:
        vitrify.convert_(model, vitrify.recipes.get(recipe))
    x = images(2, size, 3)
    cores = len(named_cores(model))
    logits, features = model(x), model.forward_features(x)
    report = quantise_(model, FINE, [x])
    assert not [name for name in report.floats if "never called" not in report.floats[name]]
    assert len(report.cores) >= max(cores, 1)
    error = (model.forward_features(x) - features).norm() / features.norm()
    assert error < 0.02, float(error)
    assert logits.shape == model(x).shape


@torch.no_grad()
def test_sums_that_do_not_fit_are_said():
    """Beyond its accumulators a layer is computed as if it had them; attention, whose bits are promised, raises."""
    model, x = vit(vitrify.recipes.vitality()), images()
    report = quantise_(copy.deepcopy(model), Widths(), [x])
    assert not report.overflows
    narrow = copy.deepcopy(model)
    report = quantise_(narrow, replace(Widths(), partial=14), [x])
    with pytest.raises(InputError, match=r"^blocks.0.attn.core: .* reaches \d\d bits, but partial sums have 14"):
        narrow(x)
    linear = net(nn.Linear(100, 2))
    linear[0].weight.fill_(1.0)
    report = quantise_(linear, replace(Widths(), partial=20), [torch.ones(1, 100)])
    linear(torch.ones(1, 100))  # 100 * 127 * 127 = 1,612,900
    assert report.overflows == {"0": 22}
    assert "sums of 1 layers take up to 22 bits" in str(report)
    report = quantise_(net(nn.Linear(100, 2)), replace(Widths(), partial=22), [torch.ones(1, 100)])
    assert not report.overflows


@torch.no_grad()
def test_scales_stay_as_calibrated():
    model, x = vit(vitrify.recipes.vitality()), images(8)
    quantise_(model, Widths(), [x[:4], x[4:]])
    together, alone = model(x), torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_never_called_is_said_to_stay():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.called(nn.functional.linear(x, self.read.weight))

    report = quantise_(Reader(), Widths(), [torch.randn(3, 4)])
    assert list(report.floats) == ["read"]
    assert list(report.layers) == ["called"]
    assert "in float: read: never called" in str(report)


def test_bad_input():
    model, x = vit(vitrify.recipes.vitality()), images()
    with pytest.raises(InputError, match="batches is empty"):
        quantise_(copy.deepcopy(model), Widths(), [])
    with pytest.raises(InputError, match="did you mean 'affine'"):
        quantise_(copy.deepcopy(model), Widths(), [x], "afine")
    with pytest.raises(InputError, match="hold NaN or inf"):
        quantise_(copy.deepcopy(model), Widths(), [x / 0])
    squares = vit(vitrify.Recipe("squares", vitrify.AttentionSpec("taylor", squares=True)))
    with pytest.raises(UnsupportedError, match=r"blocks.0.attn.core: squares"):
        quantise_(squares, Widths(), [x])
    quantise_(model, Widths(), [x])
    core = next(iter(named_cores(model).values()))
    qkv = [torch.zeros(1, 2, 196, 32)] * 3
    with pytest.raises(UnsupportedError, match="takes no mask"):
        core(*qkv, torch.ones(1, 1, 1, 196, dtype=torch.bool), scale=1.0)
    with pytest.raises(InputError, match="100 keys and 100 values, but the schedule is for 196"):
        core(*[t[:, :, :100] for t in qkv], scale=1.0)


def test_a_biased_taylor_core_adds_its_bias():
    query, key, value = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(1)).unbind()
    bias = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(2))

    class Net(nn.Module):
        def __init__(self, core):
            super().__init__()
            self.core = core

        def forward(self, query, key, value):
            return self.core(query, key, value, scale=0.3, bias=bias)

    for how in ("carry", "drop"):
        model = Net(Taylor(bias=how))
        truth = model(query, key, value)
        quantise_(model, FINE, [(query, key, value)])
        assert isinstance(model.core, FixedTaylor)
        torch.testing.assert_close(model(query, key, value), truth, rtol=0, atol=2e-3)


def test_widths_come_from_the_hardware():
    hardware = load("vitality")
    assert widths_of("vitality") == Widths() == widths_of(hardware)
    assert form_of("vitality") == "algorithm1"
    assert form_of(replace(hardware, schedule="vitality-affine")) == "affine"
    wider = hardware.with_({"numbers.partial_bits": 32, "numbers.activation_bits": 12})
    assert widths_of(wider) == Widths(activations=12, context=12, partial=32)


def test_the_report_counts_kinds():
    report = Quantised(Widths(), {"a": "shift", "b": "shift", "c": "multiply"}, {}, {"d": "why"})
    text = str(report)
    assert text.splitlines()[1:] == ["2 x shift", "1 x multiply", "in float: d: why"]
