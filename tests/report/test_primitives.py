"""What `report.primitives` captures is where it says it is, and what the modules really did."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vitrify.convert import AttentionSpec, Recipe, convert_, pack_
from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import MixtureLinear, ShiftConv2d, ShiftLinear, calibrate_codes_
from vitrify.report.capture import capture
from vitrify.report.primitives import balanced_channels, code_maps, dispatch_maps, exponent_counts, target_share

PATCH = 4


class Patches(nn.Module):
    """Tokens that are the patches themselves, after zeros for class and register tokens; a mixture routes them."""

    def __init__(self, num_prefix: int, experts: tuple[str, ...] = ("multiply", "shift")) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.fc = MixtureLinear.adopt_(nn.Linear(PATCH**2, 3), experts, alpha=[6.0, 4.0, 5.0][: len(experts)])
        with torch.no_grad():  # bright patches multiply, dark ones go to the last expert, all others to the second
            self.fc.router.weight.zero_()
            self.fc.router.weight[0], self.fc.router.weight[-1] = 1.0, -1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = F.unfold(images, PATCH, stride=PATCH).mT
        return self.fc(F.pad(tokens, (0, 0, self.num_prefix, 0)))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(20, 12), (12, 20), (16, 16), (22, 14)])
def test_each_token_lies_where_its_patch_does(size, num_prefix):
    images = noise(3, 1, *size)
    model = Patches(num_prefix).eval()
    if num_prefix == 1:
        model.num_prefix_tokens = 1  # timm's models say so, Hugging Face's do not
    (bright,) = dispatch_maps(model, images).values()
    assert torch.equal(bright, F.avg_pool2d(images, PATCH)[:, 0] > 0)
    assert not model.fc.router._forward_hooks


def test_only_the_first_of_three_experts_multiplies():
    images = noise(2, 1, 16, 16)
    model = Patches(0, ("multiply", "int8", "shift")).eval()
    (bright,) = dispatch_maps(model, images).values()
    assert torch.equal(bright, F.avg_pool2d(images, PATCH)[:, 0] > 0)
    assert bright.float().mean() == model.fc.share[0]
    assert target_share(model.fc) == pytest.approx((1 / 6) / (1 / 6 + 1 / 4 + 1 / 5))


def test_the_paper_s_latencies_want_40_percent():
    assert target_share(Patches(0).fc) == pytest.approx(0.4)


def test_maps_of_a_vit_are_what_its_mixtures_did():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=(96, 160)).eval()
    convert_(model, Recipe("mixing", mlp="mixture"))
    images = noise(2, 3, 96, 160)
    inputs = {}
    for name, block in model.blocks.named_children():
        block.mlp.register_forward_pre_hook(lambda mlp, args, name=name: inputs.update({f"blocks.{name}.mlp": args[0]}))
    maps = dispatch_maps(model, images)
    assert list(maps) == list(inputs)
    for name, x in inputs.items():
        logits = model.get_submodule(name).router(x)
        for row, column in ((0, 0), (2, 7), (5, 9)):
            token = logits[:, 1 + 10 * row + column]
            assert torch.equal(maps[name][:, row, column], token[:, 0] >= token[:, 1])
        assert maps[name].shape == (2, 6, 10)
        assert maps[name].any()
        assert not maps[name].all()


def test_what_has_no_place_on_the_images_is_refused():
    class Folded(Patches):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(F.unfold(images, PATCH, stride=PATCH).mT.reshape(-1, 4, PATCH**2))

    with pytest.raises(InputError, match=r"recipes\.vitrify"):
        dispatch_maps(nn.Linear(2, 2), noise(1, 2))
    with pytest.raises(UnsupportedError, match="unknown"):
        dispatch_maps(Folded(0), noise(2, 1, 16, 16))
    with pytest.raises(UnsupportedError, match="266 tokens, which fill no patch grid of images of 64 x 64"):
        dispatch_maps(Patches(10), noise(2, 1, 64, 64))


def test_exponents_are_counted_exactly():
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -0.25, 0.0, 2.0**-6], [-4.0, 4.0, 0.5, 1e-9]]))
    model = nn.Sequential(ShiftLinear.adopt_(linear, bits=4), nn.GELU(), nn.Linear(2, 2))
    (counted,) = exponent_counts(model).values()
    assert counted.lowest == -6
    assert dict(zip(range(-6, 3), counted.counts.tolist(), strict=True)) == {
        **dict.fromkeys(range(-6, 3), 0),
        **{-6: 1, -2: 1, -1: 1, 0: 1, 2: 2},
    }
    assert counted.zeros == 2
    assert counted.zero_share == 0.25
    assert counted.shares.sum() == 0.75


@pytest.mark.parametrize("variant", ["ps", "q"])
def test_packed_layers_have_the_same_exponents_and_they_give_back_the_weights(variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5).double())
    ShiftConv2d.adopt_(model[0], 3, variant)
    ShiftLinear.adopt_(model[2], 5, variant)
    latent = exponent_counts(model)
    pack_(model)
    packed = exponent_counts(model)
    assert list(latent) == ["0", "2"]
    for name, layer in latent.items():
        weight = model.get_submodule(name).decoded_weight()
        powers = 2.0 ** (layer.lowest + torch.arange(len(layer.counts), dtype=torch.float64))
        assert (layer.counts * powers).sum() == weight.abs().double().sum()
        assert layer.total == weight.numel()
        assert (layer.lowest, layer.zeros) == (packed[name].lowest, packed[name].zeros)
        assert torch.equal(layer.counts, packed[name].counts)
    assert (latent["0"].zeros > 0) == (variant == "ps")


def test_a_layer_of_zeros_and_a_model_without_shift_layers():
    linear = nn.Linear(3, 2)
    nn.init.zeros_(linear.weight)
    (counted,) = exponent_counts(nn.Sequential(ShiftLinear.adopt_(linear))).values()
    assert (counted.zeros, counted.total, counted.zero_share) == (6, 6, 1.0)
    with pytest.raises(InputError, match="no shift layer"):
        exponent_counts(nn.Linear(2, 2))


@pytest.mark.parametrize("share", [False, True])
def test_codes_are_the_core_s_own_on_the_grid(share):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=(96, 160)).eval()
    convert_(model, Recipe("codes", AttentionSpec("hamming", form="taylor", share_codes=share)))
    images = noise(2, 3, 96, 160)
    calibrate_codes_(model, images)
    maps = code_maps(model, images)
    for name, seen in capture(model, images).items():
        core = model.get_submodule(name)
        key_binariser = core.query_binariser if share else core.key_binariser
        for tokens, shown in (
            (core.query_binariser(seen.query), maps[name].query),
            (key_binariser(seen.key), maps[name].key),
        ):
            assert shown.shape == (2, 2, 32, 6, 10)
            assert torch.equal(shown[..., 4, 7], tokens[:, :, 1 + 10 * 4 + 7] > 0)
            assert 0 < shown.float().mean() < 1


def test_reduced_keys_have_a_grid_of_their_own():
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    convert_(model, Recipe("codes", AttentionSpec("hamming", form="taylor"), keep_if_costlier=False))
    first, *_, last = code_maps(model, noise(1, 3, 64, 96)).values()
    assert first.query.shape[-2:] == (16, 24)
    assert first.key.shape[-2:] == (2, 3)
    assert last.query.shape[-2:] == last.key.shape[-2:] == (2, 3)


def test_codes_need_a_core_that_has_some():
    with pytest.raises(InputError, match="no Hamming core"):
        code_maps(timm.create_model("test_vit"), noise(1, 3, 160, 160))


def test_balanced_channels_come_first():
    codes = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
    codes[0, 1, 0] = codes[0, 3, 0, 0] = codes[0, 2] = True
    assert balanced_channels(codes, 2) == [1, 3]
