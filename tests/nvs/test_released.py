"""The released checkpoints' layout: a file with their names and shapes, and made-up numbers."""

import pytest
import torch

from vitrify.errors import InputError
from vitrify.nvs import released


def linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def attention_shapes(name, width):
    shapes = {}
    for part in ("q_fc", "k_fc", "v_fc"):
        shapes |= linear(f"{name}.{part}", width, width, bias=False)
    return shapes | linear(f"{name}.out_fc", width, width)


def net_shapes(depth, width=64, features=32, encoded=126):
    """Names and shapes of gnt/transformer_network.py's GNT."""
    shapes = linear("rgbfeat_fc.0", features + 3, width) | linear("rgbfeat_fc.2", width, width)
    for i in range(depth):
        for side in ("cross", "self"):
            block = f"view_{side}trans.{i}"
            shapes |= norm(f"{block}.attn_norm", width) | norm(f"{block}.ff_norm", width)
            shapes |= linear(f"{block}.ff.fc1", width, 4 * width) | linear(f"{block}.ff.fc2", 4 * width, width)
            shapes |= attention_shapes(f"{block}.attn", width)
        mlps = f"view_crosstrans.{i}.attn"
        shapes |= linear(f"{mlps}.pos_fc.0", 4, width // 8) | linear(f"{mlps}.pos_fc.2", width // 8, width)
        shapes |= linear(f"{mlps}.attn_fc.0", width, width // 8) | linear(f"{mlps}.attn_fc.2", width // 8, width)
        if i % 2 == 0:
            shapes |= linear(f"q_fcs.{i}.0", width + encoded, width) | linear(f"q_fcs.{i}.2", width, width)
    return shapes | norm("norm", width) | linear("rgb_fc", width, 3)


def encoder_shapes(outputs):
    """Names and shapes of gnt/feature_network.py's ResUNet on a ResNet-34."""
    shapes = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    inputs = 64
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6)), 1):
        for j in range(blocks):
            block = f"layer{stage}.{j}"
            shapes |= {
                f"{block}.conv1.weight": (channels, inputs, 3, 3),
                f"{block}.conv2.weight": (channels, channels, 3, 3),
            }
            shapes |= norm(f"{block}.bn1", channels) | norm(f"{block}.bn2", channels)
            if j == 0:
                shapes |= {f"{block}.downsample.0.weight": (channels, inputs, 1, 1)} | norm(
                    f"{block}.downsample.1", channels
                )
            inputs = channels
    for name, before, after in (
        ("upconv3.conv", 256, 128),
        ("iconv3", 256, 128),
        ("upconv2.conv", 128, 64),
        ("iconv2", 128, outputs),
    ):
        shapes |= {f"{name}.conv.weight": (after, before, 3, 3), f"{name}.conv.bias": (after,)} | norm(
            f"{name}.bn", after
        )
    return shapes | {"out_conv.weight": (outputs, outputs, 1, 1), "out_conv.bias": (outputs,)}


def checkpoint(depth=8, fine=False, prefix=""):
    generator = torch.Generator().manual_seed(0)

    def filled(shapes):
        return {prefix + name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    content = {"optimizer": {"state": {}, "param_groups": []}, "scheduler": {"last_epoch": 3}}
    content |= {"net_coarse": filled(net_shapes(depth)), "feature_net": filled(encoder_shapes(64 if fine else 32))}
    return content | ({"net_fine": filled(net_shapes(depth))} if fine else {})


def saved(tmp_path, content):
    torch.save(content, tmp_path / "model_720000.pth")
    return tmp_path / "model_720000.pth"


@pytest.mark.parametrize(("depth", "fine", "prefix"), [(8, False, ""), (4, False, "module."), (4, True, "")])
def test_every_tensor_arrives_where_it_belongs(tmp_path, depth, fine, prefix):
    content = checkpoint(depth, fine, prefix)
    model = released.load(saved(tmp_path, content))
    shape = model.architecture
    assert (shape.depth, shape.width, shape.squeeze, shape.features, shape.frequencies) == (depth, 64, 8, 32, 10)
    assert (shape.channels, shape.blocks, shape.fine_net) == ((64, 128, 256), (3, 4, 6), fine)
    assert (shape.points, shape.fine_points) == (64, 64 if fine else 0)
    assert not model.training
    theirs = content["net_coarse"], content["feature_net"]
    assert torch.equal(
        model.coarse.blocks[2].view.attn.score.fc2.weight, theirs[0][f"{prefix}view_crosstrans.2.attn.attn_fc.2.weight"]
    )
    assert torch.equal(model.coarse.blocks[2].ray.place.fc1.bias, theirs[0][f"{prefix}q_fcs.2.0.bias"])
    assert torch.equal(
        model.coarse.blocks[3].ray.attn.key.weight, theirs[0][f"{prefix}view_selftrans.3.attn.k_fc.weight"]
    )
    assert torch.equal(model.encoder.up1.join.weight, theirs[1][f"{prefix}iconv3.conv.weight"])
    assert torch.equal(
        model.encoder.stages[1][0].shortcut[1].weight, theirs[1][f"{prefix}layer2.0.downsample.1.weight"]
    )
    loaded = sum(tensor.sum().double() for tensor in model.state_dict().values())
    given = sum(
        tensor.sum().double() for net in content.values() for tensor in net.values() if isinstance(tensor, torch.Tensor)
    )
    torch.testing.assert_close(loaded, given)


def test_names_map_one_to_one():
    names = [*net_shapes(8), *encoder_shapes(32)]
    assert len({released.our_name(name) for name in names}) == len(names)


def test_fields_that_tensors_do_not_show_can_be_given(tmp_path):
    model = released.load(saved(tmp_path, checkpoint(2)), points=32, fine_points=16)
    assert (model.architecture.points, model.architecture.fine_points) == (32, 16)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint at .*gone.pth"):
        released.load(tmp_path / "gone.pth")
    with pytest.raises(InputError, match="needs net_coarse and feature_net, not state_dict"):
        released.load(saved(tmp_path, {"state_dict": {}}))
    file = tmp_path / "cut.pth"
    file.write_bytes(saved(tmp_path, checkpoint(1)).read_bytes()[:5000])
    with pytest.raises(InputError, match="not a complete torch checkpoint"):
        released.load(file)
    with pytest.raises(InputError, match=r"has no coarse\.embed"):
        released.load(saved(tmp_path, {"net_coarse": {}, "feature_net": {}}))
    for net in (None, {"norm.weight": 1.0}, {3: torch.zeros(1)}):
        with pytest.raises(InputError, match="its net_coarse is no dict of tensors"):
            released.load(saved(tmp_path, {"net_coarse": net, "feature_net": {}}))
    with pytest.raises(InputError, match="too few dimensions"):
        released.load(saved(tmp_path, {"net_coarse": {"rgbfeat_fc.0.weight": torch.zeros(3)}, "feature_net": {}}))


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path):
    content = checkpoint(2)
    del content["net_coarse"]["view_crosstrans.1.attn.v_fc.weight"]
    content["feature_net"]["layer4.0.conv1.weight"] = torch.zeros(1)
    with pytest.raises(
        InputError, match=r"missing key: coarse.blocks.1.view.attn.value.weight; 1 unexpected key: .*stages.3"
    ):
        released.load(saved(tmp_path, content))


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("ran",))

    with pytest.raises(InputError, match="would run code"):
        released.load(saved(tmp_path, {"net_coarse": Trap(), "feature_net": {}}))
