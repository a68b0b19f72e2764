"""PVTv1 against the released checkpoint's names and shapes, and against transformers' own PVT."""

import copy
import re

import pytest
import timm
import torch

import vitrify.models  # registers the models
from vitrify.artefact import create_model, load, save
from vitrify.convert import AttentionSpec, Recipe, convert_
from vitrify.errors import InputError

DIMS, RATIOS, REDUCTIONS = (64, 128, 320, 512), (8, 8, 4, 4), (8, 4, 2, 1)
NARROW = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def narrow(**changes):
    """A quarter of a percent of PVT-Tiny, with random values where initial ones are 0 or 1."""
    torch.manual_seed(0)
    model = timm.create_model("pvt_v1_tiny", **NARROW, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def released(depths):
    """Names and shapes in the released `pvt_*.pth`, as transformers' conversion script lists them."""
    shapes = {"cls_token": (1, 1, 512), "norm.weight": (512,), "norm.bias": (512,)}
    shapes |= {"head.weight": (1000, 512), "head.bias": (1000,)}
    for i, (c, ratio, sr, depth) in enumerate(zip(DIMS, RATIOS, REDUCTIONS, depths, strict=True), 1):
        side = 224 // 2 ** (i + 1)
        shapes[f"pos_embed{i}"] = (1, side**2 + (i == 4), c)
        patch = (c, DIMS[i - 2], 2, 2) if i > 1 else (c, 3, 4, 4)
        shapes |= {f"patch_embed{i}.proj.weight": patch, f"patch_embed{i}.proj.bias": (c,)}
        shapes |= {f"patch_embed{i}.norm.{p}": (c,) for p in ("weight", "bias")}
        for j in range(depth):
            layers = {"attn.q": (c, c), "attn.kv": (2 * c, c), "attn.proj": (c, c)}
            layers |= {"mlp.fc1": (ratio * c, c), "mlp.fc2": (c, ratio * c), "norm1": (c,), "norm2": (c,)}
            if sr > 1:
                layers |= {"attn.sr": (c, c, sr, sr), "attn.norm": (c,)}
            for layer, shape in layers.items():
                shapes[f"block{i}.{j}.{layer}.weight"] = shape
                shapes[f"block{i}.{j}.{layer}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize(
    ("name", "depths", "count", "paper"),
    [("pvt_v1_tiny", (2, 2, 2, 2), 13_229_288, 13.2), ("pvt_v1_small", (3, 4, 6, 3), 24_485_864, 24.5)],
)
def test_parameters_are_those_of_the_release(name, depths, count, paper):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == released(depths)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert round(count / 1e6, 1) == paper
    # Shapes do not tell: the paper's table 1.
    assert [getattr(model, f"block{i}")[-1].attn.num_heads for i in (1, 2, 3, 4)] == [1, 2, 5, 8]


def test_a_file_in_the_release_s_format_loads_as_it_is(tmp_path):
    state = {name: torch.full(shape, i / 256) for i, (name, shape) in enumerate(released((2, 2, 2, 2)).items())}
    torch.save(state, tmp_path / "pvt_tiny.pth")
    model = create_model("pvt_v1_tiny", checkpoint=tmp_path / "pvt_tiny.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match=r"'head' \(1000 classes\) was left out"):
        other = create_model("pvt_v1_tiny", checkpoint=tmp_path / "pvt_tiny.pth", num_classes=3)
    assert other.head.weight.shape == (3, 512)


def test_norms_have_the_original_s_eps():
    eps = {n: m.eps for n, m in timm.create_model("pvt_v1_tiny", **NARROW).named_modules() if hasattr(m, "eps")}
    default = {n for n in eps if n.startswith("patch_embed") or n.endswith("attn.norm")}
    assert len(default) == 4 + 6
    assert all(value == (1e-5 if name in default else 1e-6) for name, value in eps.items())


def test_computes_what_transformers_pvt_computes():
    """The same weights in an implementation by others, converted from the same release; in float64, to rounding."""
    transformers = pytest.importorskip("transformers")
    model = narrow().double()
    dims, heads = list(NARROW["embed_dims"]), list(NARROW["num_heads"])
    config = transformers.PvtConfig(hidden_sizes=dims, num_attention_heads=heads, num_labels=5)
    peer = transformers.PvtForImageClassification(config).double().eval()
    state = {}
    for name, value in model.state_dict().items():
        parts = zip("kv", value.chunk(2), strict=True) if ".kv." in name else [("kv", value)]
        state |= {name_in_transformers(name.replace(".kv.", f".{part}.")): tensor for part, tensor in parts}
    peer.load_state_dict(state)
    for name, module in peer.named_modules():
        if name.endswith(".layer_norm") and name != "pvt.encoder.layer_norm":
            module.eps = 1e-5  # the original's; transformers gives these the eps of the blocks
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.inference_mode():
        tokens, logits = peer.pvt(images).last_hidden_state, peer(images).logits
        torch.testing.assert_close(model.forward_features(images), tokens, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(images), logits, rtol=1e-9, atol=1e-9)
    assert logits.std(0).max() > 1e-4  # the images matter far more than the tolerance


def name_in_transformers(name):
    renamed = {r"^block(\d)": r"block.\1", r"^(patch_embed)(\d)\.": r"patch_embeddings.\2."}
    renamed |= {r"^pos_embed(\d)": r"patch_embeddings.\1.position_embeddings", r"^cls": "patch_embeddings.4.cls"}
    renamed |= {r"\.proj\.(?=\w+$)": ".projection.", "attn.projection": "attention.output.dense"}
    renamed |= {r"attn\.q": "attn.query", r"attn\.k": "attn.key", r"attn\.v": "attn.value"}
    renamed |= {r"attn\.sr": "attn.sequence_reduction", r"attn\.": "attention.self.", r"mlp\.fc": "mlp.dense"}
    renamed |= {r"norm(\d)": r"layer_norm_\1", r"(?<!_)norm\.": "layer_norm."}
    for old, new in renamed.items():
        name = re.sub(old, new, name)
    # Stages count from 0 there.
    name = re.sub(r"^(block|patch_embeddings)\.(\d)", lambda match: f"{match[1]}.{int(match[2]) - 1}", name)
    return name.replace("head", "classifier") if name.startswith("head") else f"pvt.encoder.{name}"


@pytest.mark.parametrize("size", [(448, 448), (32, 32), (96, 64), (100, 70)])
def test_any_image_size_has_its_own_grid(size):
    """448 px: stage 2 then has as many tokens as stage 1 at 224 px, over which the original stumbles."""
    model = narrow()
    tokens = model.forward_features(torch.zeros(1, 3, *size))
    assert tokens.shape == (1, 1 + (size[0] // 32) * (size[1] // 32), 32)
    assert tokens.isfinite().all()


@pytest.mark.parametrize("stage", [1, 4])
def test_position_embeddings_are_interpolated_bilinearly(stage):
    """A ramp stays a ramp at twice the size, sampled at pixel centres, held at the edges; the class token's stays."""
    model, seen = narrow(), []
    positions = getattr(model, f"pos_embed{stage}")
    side = 224 // 2 ** (stage + 1)
    with torch.no_grad():
        getattr(model, f"patch_embed{stage}").norm.weight.zero_()
        getattr(model, f"patch_embed{stage}").norm.bias.zero_()
        model.cls_token.zero_()
        positions.zero_()
        positions[0, -(side**2) :] = torch.arange(side).repeat(side)[:, None].float()
        positions[0, : stage == 4] = -7
        getattr(model, f"block{stage}")[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(torch.zeros(1, 3, 448, 448))
    ramp = ((torch.arange(2 * side) + 0.5) / 2 - 0.5).clamp(0, side - 1)
    torch.testing.assert_close(seen[0][0, -4 * side**2 :, 0], ramp.repeat(2 * side))
    assert seen[0].shape[1] - 4 * side**2 == (stage == 4)
    assert (seen[0][0, : stage == 4] == -7).all()


def test_the_head_reads_the_class_token_which_reads_the_image():
    model, images = narrow(), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert torch.equal(model.head(tokens[:, 0]), model(images))
    assert not torch.allclose(tokens[0, 0], tokens[1, 0])


def test_checkpointing_and_drop_path_train_every_parameter():
    model, images = narrow(drop_path_rate=0.1).train(), torch.randn(4, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.abs().sum() > 0, name
    rates = [block.drop_path.drop_prob for i in range(4) for block in getattr(model, f"block{i + 1}")]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


@pytest.mark.parametrize("core", ["softmax", "taylor"])
def test_conversion_takes_every_attention_and_survives_a_save(tmp_path, core):
    model = create_model("pvt_v1_tiny", **NARROW).eval()
    original, images = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    conversion = convert_(model, Recipe(attention=AttentionSpec(core=core), keep_if_costlier=False))
    assert len(conversion.changed) == 8
    assert torch.equal(model(images), original(images)) == (core == "softmax")
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").eval()(images), model(images))


def test_classifier_and_bad_arguments():
    model = narrow()
    model.reset_classifier(7)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_classes) == (1, 7)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    with pytest.raises(InputError, match="No pretrained weights exist for pvt_v1_tiny"):
        create_model("pvt_v1_tiny", pretrained=True)
    assert vitrify.models.pvt_v1_small().pretrained_cfg["classifier"] == "head"
