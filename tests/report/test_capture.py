import pytest
import timm
import torch

from vitrify.bench.observe import named_cores
from vitrify.convert import convert_, recipes
from vitrify.errors import InputError
from vitrify.report.capture import Seen, capture, logit_histograms, weight_maps


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    """The same small ViT with softmax and with Taylor cores; keys share an offset, as trained models' do."""
    torch.manual_seed(0)
    made = {}
    state = None
    for name in ("softmax", "taylor"):
        model = timm.create_model("test_vit").eval()
        if state is None:
            for block in model.blocks:
                torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
                torch.nn.init.normal_(block.attn.qkv.bias, std=1.0)
            state = model.state_dict()
        model.load_state_dict(state)
        convert_(model, recipes.get(name))
        made[name] = model
    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", ["softmax", "taylor"])
def test_weights_give_the_core_s_own_output(models, images, kind):
    outputs = {}
    cores = named_cores(models[kind])
    handles = [
        core.register_forward_hook(lambda core, args, out, name=name: outputs.update({name: out}))
        for name, core in cores.items()
    ]
    seen = capture(models[kind], images)
    for handle in handles:
        handle.remove()
    assert list(seen) == list(cores)
    for name, one in seen.items():
        weights = one.softmax_weights() if kind == "softmax" else one.taylor_weights()
        torch.testing.assert_close(weights @ one.value, outputs[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-4)


def test_capture_leaves_no_hook_behind(models, images):
    capture(models["softmax"], images[:1])
    assert all(not core._forward_pre_hooks for core in named_cores(models["softmax"]).values())


def test_an_unconverted_model_is_refused(images):
    with pytest.raises(InputError, match=r"recipes\.softmax"):
        capture(timm.create_model("test_vit"), images)


def test_shares_count_every_logit_even_outside_the_histogram(models, images):
    batches = [images[:2], images[2:]]
    histograms = logit_histograms(models["softmax"], batches, limit=0.5)
    seen = capture(models["softmax"], images)
    for histogram in histograms:
        one = seen[histogram.name]
        for centred, share in ((False, histogram.raw_share), (True, histogram.centred_share)):
            key = one.key - one.key.mean(-2, keepdim=True) if centred else one.key
            logits = torch.einsum("bhqd,bhkd->bhqk", one.query, key) * one.scale
            expected = ((logits >= -1) & (logits < 1)).double().mean().item()
            assert share == pytest.approx(expected, abs=1e-4)
            assert 0 < share < 1
        assert histogram.centred_share > histogram.raw_share  # the offset of the keys is what centring removes
        area = (histogram.raw * histogram.edges.diff()).sum()
        assert area < 0.95  # most lie beyond +-0.5


def test_densities_integrate_to_one_where_the_range_suffices(models, images):
    for histogram in logit_histograms(models["softmax"], [images], limit=200, bins=50):
        assert (histogram.centred * histogram.edges.diff()).sum() == pytest.approx(1, abs=1e-6)


def test_maps_put_each_patch_where_it_lies():
    weights = torch.zeros(1, 1, 7, 7)  # one prefix token, a grid of 2 x 3
    weights[0, 0, 0, 1 + 4] = 1.0  # the prefix token looks at row 1, column 1
    maps = weight_maps(weights, grid=(2, 3), num_prefix_tokens=1, query=0)
    assert maps.shape == (1, 1, 2, 3)
    assert maps[0, 0].nonzero().tolist() == [[1, 1]]
    assert maps[0, 0, 1, 1] == 7.0  # seven times uniform attention
    mean = weight_maps(weights, grid=(2, 3), num_prefix_tokens=1, query=None)
    assert mean[0, 0, 1, 1] == pytest.approx(1.0)


def test_uniform_attention_is_one_everywhere():
    query, key = torch.zeros(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    seen = Seen(query, key, key, 0.5)
    for weights in (seen.softmax_weights(), seen.taylor_weights()):
        maps = weight_maps(weights, grid=(2, 3), num_prefix_tokens=0, query=3)
        torch.testing.assert_close(maps, torch.ones(1, 2, 2, 3))
