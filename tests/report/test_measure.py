import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from vitrify.bench.observe import attention_multiplications
from vitrify.convert import convert_, recipes
from vitrify.errors import VitrifyError
from vitrify.nn.cores import Taylor
from vitrify.report.measure import Accuracy, compare, predict


@pytest.fixture(scope="module")
def models():
    made = []
    for name in ("softmax", "vitality"):
        torch.manual_seed(0)
        made.append(timm.create_model("test_vit").eval())
        convert_(made[-1], recipes.get(name))
    return made


def test_accuracy_and_its_interval():
    accuracy = Accuracy.of(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 3, 4]))
    assert accuracy.percent == 75.0
    assert accuracy.margin == pytest.approx(196 * (0.75 * 0.25 / 4) ** 0.5)


def test_predict_keeps_the_order():
    data = TensorDataset(torch.eye(5).repeat(3, 1), torch.arange(15))
    predictions, labels = predict(torch.nn.Identity(), data, batch_size=4)
    assert predictions.tolist() == list(range(5)) * 3
    assert labels.tolist() == list(range(15))


def test_multiplications_follow_the_paper_s_formulas(models):
    images = torch.randn(2, 3, 160, 160)
    blocks, heads, n, d = len(models[0].blocks), 2, 101, 32
    assert attention_multiplications(models[0], images) == blocks * heads * 2 * n * n * d
    # The affine form, up to the d^2 products that finish the context matrix.
    assert attention_multiplications(models[1], images) == pytest.approx(blocks * heads * 2 * n * d * d, rel=0.01)


def test_compare_measures_both(models):
    point = compare(*models, torch.randn(1, 3, 160, 160), seconds=0.02)
    assert (point.tokens, point.image_size) == (101, 160)
    assert min(point.core_softmax.min_ms, point.core_taylor.min_ms) > 0
    assert point.model_softmax.median_ms > point.core_softmax.median_ms
    assert point.model_speedup.verdict in ("faster", "slower", "within noise")
    weights_mib = 2 * 101 * 101 * 4 / 2**20
    assert point.memory_mib["unfused"] >= weights_mib
    assert point.memory_mib["unfused"] > point.memory_mib["taylor"] > 0


def test_a_wrong_core_is_not_timed(models, monkeypatch):
    right = Taylor.forward
    monkeypatch.setattr(Taylor, "forward", lambda self, *args, **kwargs: 1.01 * right(self, *args, **kwargs))
    monkeypatch.setattr("vitrify.report.measure.interleave", lambda *args, **kwargs: pytest.fail("timed a wrong core"))
    with pytest.raises(VitrifyError, match="taylor core is wrong"):
        compare(*models, torch.randn(1, 3, 160, 160), seconds=0.02)
