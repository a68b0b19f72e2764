import sys

import pytest
import torch

from vitrify.errors import InputError
from vitrify.nvs import metrics

needs_skimage = pytest.mark.skipif(
    metrics.find_spec("skimage") is None, reason="scikit-image is not installed (extra nvs)"
)


def picture(seed=0):
    return torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(seed))


def test_psnr():
    truth = torch.full((3, 4, 4), 0.5)
    assert metrics.psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-5)
    assert metrics.psnr(truth + 0.01, truth) == pytest.approx(40, abs=1e-4)
    assert metrics.psnr(truth, truth) == 100


@needs_skimage
def test_ssim_against_its_formula():
    """Two flat pictures: only the luminance term is left, (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2."""
    a, b = torch.full((3, 16, 16), 0.4), torch.full((3, 16, 16), 0.6)
    assert metrics.ssim(a, b) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4), abs=1e-6)
    assert metrics.ssim(picture(), picture()) == pytest.approx(1)
    assert metrics.ssim(picture(), picture(1)) < 0.2


def test_pictures_too_small_for_ssims_window():
    with pytest.raises(InputError, match="at least 11 x 11 pixels, not 13 x 10"):
        metrics.ssim(torch.rand(3, 10, 13), torch.rand(3, 10, 13))


def test_ssim_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.delitem(sys.modules, "skimage.metrics", raising=False)
    with pytest.raises(InputError, match=r"SSIM needs skimage: pip install 'vitrify\[nvs\]'"):
        metrics.ssim(picture(), picture())


@pytest.mark.parametrize("other", [torch.rand(3, 24, 31), torch.rand(1, 3, 24, 32)])
def test_pictures_of_different_sizes(other):
    with pytest.raises(InputError, match=r"must both be \(3, H, W\), not \(3, 24, 32\)"):
        metrics.psnr(picture(), other)


@needs_skimage
def test_compare_leaves_lpips_out_where_it_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(metrics, "why_no_lpips", lambda: "no weights")
    assert set(metrics.compare(picture(), picture(1))) == {"psnr", "ssim"}
    with pytest.raises(InputError, match="no weights"):
        metrics.lpips(picture(), picture())


def test_why_there_is_no_lpips(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert "package lpips" in metrics.why_no_lpips()
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    assert "alexnet-owt-7be5be79.pth" in metrics.why_no_lpips()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert metrics.why_no_lpips() is None


@pytest.mark.skipif(metrics.why_no_lpips() is not None, reason=str(metrics.why_no_lpips()))
def test_lpips():
    large = torch.rand(3, 64, 64)
    assert metrics.lpips(large, large) == pytest.approx(0, abs=1e-6)
    assert metrics.lpips(large, 1 - large) > 0.1
