"""LeViT: the identity in both layouts, and the position bias under the Taylor expansion."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_helpers import attention_names, observe
from timm.models.levit import AttentionDownsample, Levit

from vitrify.convert import Recipe, convert_
from vitrify.convert.copies import randomise
from vitrify.nn import Taylor

# A grid of 6 x 4 tokens, then 3 x 2: not square, and keys of another width than values.
SIZE = (3, 96, 64)
LAYOUTS = [pytest.param(False, id="linear"), pytest.param(True, id="conv")]


def levit(use_conv=False, dtype=torch.float32, **kwargs):
    model = Levit(
        img_size=SIZE[1:], embed_dim=(24, 32), key_dim=4, depth=(1, 1), num_heads=(3, 4), num_classes=5,
        use_conv=use_conv, **kwargs,
    )  # fmt: skip
    randomise(model, torch.Generator().manual_seed(7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
    return model.to(dtype).eval()


def images(dtype=torch.float32):
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def taylor(**spec):
    return Recipe("test", {"core": "taylor", **spec}, keep_if_costlier=False)


def core_calls(model, x):
    """Run the model: (query, key, value, kwargs, output) of every core, by the attention's name."""
    calls, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(".core"):
            handles.append(
                module.register_forward_hook(
                    lambda m, args, kwargs, out, name=name: calls.update({name: (*args[:3], kwargs, out)}),
                    with_kwargs=True,
                )
            )
    model(x)
    for handle in handles:
        handle.remove()
    return calls


def expansion(query, key, value, bias, scale):
    """Softmax with exp(x) replaced by 1 + x, where q.k and the bias are centred over the keys; quadratic."""
    x = scale * query @ (key - key.mean(-2, keepdim=True)).mT + bias - bias.mean(-1, keepdim=True)
    weights = 1 + x
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("use_conv", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_softmax_recipe_is_the_identity(use_conv, training):
    original = levit(use_conv)
    original.train(training)
    converted = copy.deepcopy(original)
    conversion = convert_(converted, Recipe("identity", "softmax"))
    names = attention_names(conversion)
    assert len(names) == 3
    assert not conversion.refused
    assert list(converted.state_dict()) == list(original.state_dict())

    x = images()
    expected, expected_outputs, expected_calls = observe(original, names, x)
    actual, outputs, calls = observe(converted, names, x)
    assert calls == expected_calls
    for name in names:
        assert torch.equal(outputs[name], expected_outputs[name]), name
    assert torch.equal(actual, expected)

    expected.sum().backward()
    actual.sum().backward()
    gradients = {name: p.grad for name, p in converted.named_parameters()}
    for name, parameter in original.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("use_conv", LAYOUTS)
def test_pooled_queries_are_kept(use_conv):
    module = AttentionDownsample(12, 16, key_dim=4, num_heads=3, resolution=(5, 4), use_conv=use_conv, use_pool=True)
    randomise(module, torch.Generator().manual_seed(3))
    module.eval()
    x = torch.randn(2, 12, 5, 4) if use_conv else torch.randn(2, 20, 12)
    expected = module(x)
    assert convert_(module, Recipe("identity", "softmax")).changed
    assert torch.equal(module(x), expected)


def test_train_keeps_the_source_s_habits():
    module = levit().stages[0].blocks[0].attn
    convert_(module, taylor())
    assert module.train() is None
    assert module.core.training
    module.eval()
    x = torch.randn(2, 24, 24)
    before = module(x)
    assert len(module.attention_bias_cache) == 1
    with torch.no_grad():
        module.attention_biases.add_(torch.randn_like(module.attention_biases))
    module.train()
    module.eval()
    assert not torch.allclose(module(x), before)


@pytest.mark.parametrize("use_conv", LAYOUTS)
def test_the_bias_is_carried_as_the_quadratic_expansion_says(use_conv):
    model = levit(use_conv, dtype=torch.float64)
    convert_(model, taylor())
    calls = core_calls(model, images(torch.float64))
    shapes = {name: (q.shape[2], k.shape[2], k.shape[3], v.shape[3]) for name, (q, k, v, *_) in calls.items()}
    assert shapes == {
        "stages.0.blocks.0.attn.core": (24, 24, 4, 8),
        "stages.1.downsample.attn_downsample.core": (6, 24, 4, 16),
        "stages.1.blocks.0.attn.core": (6, 6, 4, 8),
    }
    for name, (query, key, value, kwargs, out) in calls.items():
        exact = expansion(query, key, value, kwargs["bias"], kwargs["scale"])
        assert (out - exact).abs().max() <= 1e-12 * exact.abs().max(), name
        # The bias matters: without it the result is another.
        assert (out - expansion(query, key, value, torch.zeros_like(kwargs["bias"]), kwargs["scale"])).abs().max() > 0.1


def test_the_expansion_s_error_is_of_second_order():
    """Logits and biases ten times smaller leave a hundredth of the error against softmax."""
    core = Taylor()
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 9, 9, generator=generator, dtype=torch.float64)

    def error(size):
        softmax = F.scaled_dot_product_attention(query, key, value, attn_mask=size * bias, scale=size)
        return (core(query, key, value, scale=size, bias=size * bias) - softmax).abs().max()

    assert error(1e-2) / error(1e-3) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("use_conv", LAYOUTS)
def test_a_dropped_bias_leaves_plain_taylor_attention(use_conv):
    model = levit(use_conv, dtype=torch.float64)
    keys = list(model.state_dict())
    conversion = convert_(model, taylor(bias="drop"))
    assert all("position bias dropped" in change.detail for change in conversion.changed)
    assert list(model.state_dict()) == keys
    for query, key, value, kwargs, out in core_calls(model, images(torch.float64)).values():
        assert kwargs["bias"] is None
        plain = expansion(query, key, value, torch.zeros((), dtype=torch.float64)[None], kwargs["scale"])
        assert (out - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_the_sparse_part_spans_softmax_and_taylor():
    """Threshold 0 in training is softmax with the bias; evaluation is Taylor with the bias."""
    model = levit(dtype=torch.float64)
    softmax, low_rank = copy.deepcopy(model), copy.deepcopy(model)
    x = images(torch.float64)
    convert_(low_rank, taylor())
    convert_(model, Recipe("all", {"core": "taylor_sparse", "threshold": 0}, keep_if_costlier=False))
    assert torch.equal(model(x), low_rank(x))
    model.train()
    softmax.train()
    expected = softmax(x)
    assert (model(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert {float(m.density) for m in model.modules() if hasattr(m, "density")} == {1.0}


def test_the_cost_of_the_bias_decides_what_is_kept():
    # Per head of the first stage, 24 tokens: softmax 24 * 24 * (4 + 8), Taylor 2 * 24 * 4 * 8, the bias 24 * 24 * 8.
    conversion = convert_(levit(), Recipe("carry", "taylor"), input_size=SIZE)
    changed = {change.name: change.detail for change in conversion.changed}
    assert list(changed) == ["stages.0.blocks.0.attn"]
    detail = changed["stages.0.blocks.0.attn"]
    assert "n_q n_k d_v = 4,608 multiplications per head" in detail
    assert "6,912 -> 6,144 multiplications" in detail
    kept = {change.name: change.detail for change in conversion.kept}
    assert "taylor would multiply 4,224 times per head, softmax 2,880" in kept["stages.1.downsample.attn_downsample"]

    dropped = convert_(levit(), Recipe("drop", {"core": "taylor", "bias": "drop"}), input_size=SIZE)
    assert len(dropped.changed) == 3
    assert "6,912 -> 1,536 multiplications" in dropped.changed[0].detail

    # The sparse core adds the bias to scores that it computes anyway.
    assert len(convert_(levit(), Recipe("sparse", "sparse"), input_size=SIZE).changed) == 3


@pytest.mark.parametrize(
    ("core", "bias", "dropped"), [("sparse", "drop", 3), ("sparse", "carry", 0), ("softmax", "drop", 0)]
)
def test_a_dropped_bias_is_remarked_on_whatever_the_core(core, bias, dropped):
    conversion = convert_(levit(), Recipe("mine", {"core": core, "bias": bias}), input_size=SIZE)
    assert ["position bias dropped" in change.detail for change in conversion.changed].count(True) == dropped


def test_squares_have_no_place_for_a_bias():
    model = levit()
    conversion = convert_(model, taylor(squares=True))
    assert len(conversion.refused) == 3
    assert all("attention.bias to 'drop'" in change.detail for change in conversion.refused)
    assert len(convert_(model, taylor(squares=True, bias="drop")).changed) == 3
    assert model(images()).isfinite().all()


@pytest.mark.parametrize("use_conv", LAYOUTS)
def test_the_value_convolution_is_read_where_the_queries_are(use_conv):
    model = levit(use_conv)
    expected = copy.deepcopy(model)(images())
    convert_(model, Recipe("conv", {"core": "softmax", "value_conv": 3}))
    assert torch.equal(model(images()), expected)  # it starts at zero

    for name, stride in (("stages.0.blocks.0.attn", 1), ("stages.1.downsample.attn_downsample", 2)):
        module = model.get_submodule(name)
        torch.nn.init.normal_(module.value_conv.conv.weight)
        heads, width = module.num_heads, module.val_dim
        value = torch.randn(2, heads, 24, width)
        image = value.mT.reshape(2, heads * width, 6, 4)
        convolved = F.conv2d(image, module.value_conv.conv.weight, stride=stride, padding=1, groups=heads * width)
        rows = module.convolve(value, (6, 4, 0))
        torch.testing.assert_close(rows, convolved.reshape(2, heads, width, -1).mT)
    assert not torch.allclose(model(images()), expected)


def test_a_model_without_memory_converts_too():
    with torch.device("meta"):
        model = Levit(img_size=SIZE[1:], embed_dim=(24, 32), key_dim=4, depth=(1, 1), num_heads=(3, 4), num_classes=5)
    assert len(convert_(model, taylor()).changed) == 3


@pytest.mark.parametrize("use_conv", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_graph_breaks(use_conv, training):
    model = levit(use_conv)
    convert_(model, Recipe("test", {"core": "taylor_sparse", "value_conv": 3}, keep_if_costlier=False))
    model.train(training)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)
