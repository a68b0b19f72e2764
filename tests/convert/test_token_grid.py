"""Where a value_conv learns the grid: static, dynamic and non-square images, PVT's argument, MobileViT's unfolding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import build, vit
from timm.layers.attention import Attention

from vitrify.bench.observe import attention_multiplications
from vitrify.convert import AttentionSpec, Recipe, convert_
from vitrify.errors import InputError

CONV = Recipe("conv", AttentionSpec("taylor", value_conv=3), keep_if_costlier=False)
PLAIN = Recipe("plain", "taylor", keep_if_costlier=False)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Each test compiles the same code objects, and Dynamo gives up after eight."""
    torch.compiler.reset()


def convert_pair(model):
    """The model with a non-zero convolution, and the same without one."""
    plain = copy.deepcopy(model)
    convert_(plain, PLAIN)
    conversion = convert_(model, CONV)
    for name, parameter in model.named_parameters():
        if "value_conv" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model, plain, conversion


def expected_with_convolution(module, plain, x, height, width, prefix):
    """The plain module's output, plus the convolution of V over that grid on the way into `proj`."""
    heads, dim = module.num_heads, module.head_dim
    v = plain.qkv(x).unflatten(-1, (3, heads * dim))[:, :, 2]
    grid = v[:, prefix:].mT.unflatten(2, (height, width))
    local = F.conv2d(grid, module.value_conv.conv.weight, padding=1, groups=heads * dim).flatten(2).mT
    return plain(x) + F.linear(F.pad(local, (0, 0, prefix, 0)), plain.proj.weight)


def capture(model, name, *args):
    seen = {}
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.update(x=i[0], out=o))
    model(*args)
    handle.remove()
    return seen["x"], seen["out"]


@pytest.mark.parametrize(
    ("kwargs", "size", "grid", "prefix"),
    [
        ({}, (32, 32), (4, 4), 1),
        ({"img_size": (16, 40)}, (16, 40), (2, 5), 1),
        ({"reg_tokens": 3, "dynamic_img_size": True}, (24, 56), (3, 7), 4),
        ({"class_token": False, "global_pool": "avg", "dynamic_img_size": True}, (56, 24), (7, 3), 0),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (20, 45), (3, 6), 1),
    ],
)
def test_vision_transformer(kwargs, size, grid, prefix):
    model, plain, conversion = convert_pair(vit(**kwargs))
    assert len(conversion.changed) == 2
    for _ in range(2):  # the second image has the transposed grid, where the model takes it
        x, out = capture(model, "blocks.1.attn", torch.randn(2, 3, *size))
        expected = expected_with_convolution(model.blocks[1].attn, plain.blocks[1].attn, x, *grid, prefix)
        torch.testing.assert_close(out, expected)
        assert not torch.allclose(out, plain.blocks[1].attn(x), atol=1e-2)
        if "dynamic_img_size" in kwargs:
            size, grid = size[::-1], grid[::-1]


def test_a_new_input_size_is_followed():
    model, plain, _ = convert_pair(vit())
    model.set_input_size((16, 64))
    x, out = capture(model, "blocks.0.attn", torch.randn(1, 3, 16, 64))
    expected = expected_with_convolution(model.blocks[0].attn, plain.blocks[0].attn, x, 2, 8, 1)
    torch.testing.assert_close(out, expected)


def test_distilled_prefix():
    model = build("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    model, plain, _ = convert_pair(model)
    x, out = capture(model, "blocks.0.attn", torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(out, expected_with_convolution(model.blocks[0].attn, plain.blocks[0].attn, x, 2, 2, 2))


def test_zero_convolution_changes_nothing():
    model, plain = vit(), vit()
    convert_(model, CONV)
    convert_(plain, PLAIN)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"blocks.{i}.attn.value_conv.conv.weight" for i in range(2)}
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name in added)


def test_copies_have_grids_of_their_own():
    model, *_ = convert_pair(vit(dynamic_img_size=True))
    other = copy.deepcopy(model)
    assert other.blocks[0].attn.token_grid is other.blocks[1].attn.token_grid
    assert other.blocks[0].attn.token_grid is not model.blocks[0].attn.token_grid
    wide, tall = torch.randn(2, 3, 16, 48), torch.randn(2, 3, 48, 16)
    expected = model(wide)
    other(tall)
    assert model.blocks[0].attn.token_grid.size() == (2, 6, 1)
    assert torch.equal(model(wide), expected)
    assert torch.equal(other(wide), expected)


def test_converting_again_adds_no_second_hook():
    model, *_ = convert_pair(vit())
    convert_(model, CONV)
    assert len(model.patch_embed._forward_pre_hooks) == 1


def test_the_convolution_is_counted_and_can_make_taylor_the_costlier():
    # 16 tokens, heads of 8: softmax 16 * 16 * 16, Taylor 32 * 8 * 8, the convolution 9 or 25 times 16 * 8.
    model = vit(class_token=False, global_pool="avg")
    conversion = convert_(model, Recipe("three", AttentionSpec("taylor", value_conv=3)))
    assert "4,096 -> 3,200 multiplications per head" in conversion.changed[0].detail
    assert attention_multiplications(model, torch.randn(2, 3, 32, 32)) == 2 * 3 * 3200
    five = convert_(vit(class_token=False, global_pool="avg"), Recipe("five", AttentionSpec("taylor", value_conv=5)))
    assert "taylor would multiply 5,248 times per head, softmax 4,096" in five.kept[0].detail
    # Beside softmax it is asked for as such: there is nothing cheaper to keep.
    beside = Recipe(
        "beside", AttentionSpec("taylor", value_conv=3), {"blocks.0.*": AttentionSpec("sparse", value_conv=5)}
    )
    assert len(convert_(vit(class_token=False, global_pool="avg"), beside).changed) == 2


def test_a_grid_that_nobody_reads_is_not_watched():
    model, *_ = convert_pair(vit())
    model.patch_embed.register_forward_pre_hook(lambda module, args: None)
    convert_(model, PLAIN, lambda module, name: name == "blocks.0.attn")
    assert len(model.patch_embed._forward_pre_hooks) == 2  # the other block still reads it
    convert_(model, PLAIN)
    assert len(model.patch_embed._forward_pre_hooks) == 1  # the user's own


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_for_any_size_without_breaks(checkpointing):
    model, *_ = convert_pair(vit(dynamic_img_size=True))
    model.train()
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend="eager")
    for height, width in [(24, 40), (40, 24), (64, 16)]:
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(compiled(x), model(x))


def test_attention_without_its_model_says_what_is_missing():
    model, *_ = convert_pair(vit())
    with pytest.raises(InputError, match="token grid is unknown"):
        model.blocks[0](torch.randn(1, 17, 24))
    attention = Attention(24, num_heads=3)
    conversion = convert_(attention, CONV)
    assert "token grid" in conversion.refused[0].detail
    assert type(attention) is Attention


def test_patch_drop_is_refused():
    model = vit(patch_drop_rate=0.25)
    conversion = convert_(model, CONV)
    assert len(conversion.refused) == 2
    assert "patch_drop" in conversion.refused[0].detail
    assert not model.patch_embed._forward_pre_hooks
    assert len(convert_(model, PLAIN).changed) == 2


def test_pvt_convolves_where_queries_and_keys_share_a_grid():
    kwargs = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}
    model, plain, conversion = convert_pair(build("pvt_v2_b0", **kwargs))
    assert [change.name for change in conversion.changed] == ["stages.3.blocks.0.attn"]
    assert [change.name for change in conversion.refused] == [f"stages.{i}.blocks.0.attn" for i in range(3)]
    assert all("reduced grid" in change.detail for change in conversion.refused)
    x, out = capture(model, "stages.3.blocks.0.attn", torch.randn(2, 3, 64, 160))
    module, bare = model.stages[3].blocks[0].attn, plain.stages[3].blocks[0].attn
    v = bare.kv(x).unflatten(-1, (2, 32))[:, :, 1]
    grid = v.mT.unflatten(2, (2, 5))
    local = F.conv2d(grid, module.value_conv.conv.weight, padding=1, groups=32).flatten(2).mT
    torch.testing.assert_close(out, bare(x, (2, 5)) + F.linear(local, bare.proj.weight))


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((72, 56), (5, 4))])
def test_mobilevit_unfolds_a_grid_per_pixel_position(size, grid):
    model, plain, conversion = convert_pair(build("mobilevit_xxs", num_classes=5))
    assert len(conversion.changed) == 9
    name = "stages.2.1.transformer.1.attn"
    x, out = capture(model, name, torch.randn(2, 3, *size))
    assert x.shape[:2] == (2 * 4, grid[0] * grid[1])
    expected = expected_with_convolution(model.get_submodule(name), plain.get_submodule(name), x, *grid, 0)
    torch.testing.assert_close(out, expected)
    grids = {id(model.get_submodule(change.name).token_grid) for change in conversion.changed}
    assert len(grids) == 3  # one per MobileViT block
