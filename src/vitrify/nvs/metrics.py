"""How close a picture is to the truth: PSNR, SSIM, and LPIPS where its weights are present."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrify.errors import InputError, optional

# What the package lpips asks torchvision for; torch.hub keeps it there.
_ALEXNET = "alexnet-owt-7be5be79.pth"
_WINDOW = 11  # pixels across SSIM's window


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of (3, H, W) in [0, 1]: 10 log10(1 / MSE), at most 100."""
    _check(picture, truth)
    mse = (picture.double() - truth.double()).square().mean().clamp(min=1e-10)
    return float(-10 * mse.log10())


def ssim(picture: Tensor, truth: Tensor) -> float:
    """Return the structural similarity of (3, H, W) in [0, 1], at least 11 x 11: 1 where they are equal.

    Wang et al., IEEE Transactions on Image Processing 2004: a Gaussian window of sigma 1.5. Raises InputError without
    scikit-image (extra `nvs`), and for smaller pictures.
    """
    _check(picture, truth)
    height, width = picture.shape[1:]
    if min(height, width) < _WINDOW:
        raise InputError(f"SSIM needs pictures of at least {_WINDOW} x {_WINDOW} pixels, not {width} x {height}")
    check_ssim()
    from skimage.metrics import structural_similarity  # noqa: PLC0415

    arrays = (image.double().numpy() for image in (picture, truth))
    value = structural_similarity(
        *arrays, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(value)


def check_ssim() -> None:
    """Raise InputError where `ssim` cannot be measured: before the work rather than after it."""
    with optional("skimage", "nvs", "SSIM"):
        import skimage.metrics  # noqa: F401, PLC0415


def why_no_lpips() -> str | None:
    """Return why LPIPS cannot be measured here, or None where it can: nothing is ever downloaded."""
    if find_spec("lpips") is None:
        return "LPIPS needs the package lpips"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
    return None if weights.is_file() else f"LPIPS needs torchvision's AlexNet weights in {weights}"


def lpips(picture: Tensor, truth: Tensor) -> float:
    """Return the learned perceptual distance of (3, H, W) in [0, 1], by AlexNet: 0 where they are equal.

    Zhang et al., CVPR 2018. Raises InputError where its weights are missing, see `why_no_lpips`.
    """
    _check(picture, truth)
    if (reason := why_no_lpips()) is not None:
        raise InputError(reason)
    with torch.no_grad():
        return float(_alexnet()(picture[None].float(), truth[None].float(), normalize=True))


def compare(picture: Tensor, truth: Tensor) -> dict[str, float]:
    """Return "psnr" and "ssim" of (3, H, W) in [0, 1], and "lpips" where it can be measured."""
    values = {"psnr": psnr(picture, truth), "ssim": ssim(picture, truth)}
    return values if why_no_lpips() else {**values, "lpips": lpips(picture, truth)}


@cache
def _alexnet() -> Any:
    from lpips import LPIPS  # noqa: PLC0415

    return LPIPS(net="alex", verbose=False).eval()


def _check(picture: Tensor, truth: Tensor) -> None:
    if picture.shape != truth.shape or picture.ndim != 3 or picture.shape[0] != 3:
        raise InputError(
            f"pictures to compare must both be (3, H, W), not {tuple(picture.shape)} and {tuple(truth.shape)}"
        )
