"""Our account of ViTCoD's public simulator against the simulator itself, cycle for cycle, and on its authors' mask.

Needs a checkout of github.com/GATECH-EIC/ViTCoD, its folder in VITRIFY_VITCOD, and scipy; skipped without. The mask is
the authors' and is read where it lies. The reordered one is in Git LFS and need not be there: reordering the tokens
changes none of the counts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from timm.models.vision_transformer import VisionTransformer

import vitrify
from vitrify.accelerator.masks import synthetic_masks
from vitrify.accelerator.packing import polarise
from vitrify.accelerator.published import vitcod_attention_cycles, vitcod_ffn_cycles, vitcod_linear_cycles

ROOT = os.environ.get("VITRIFY_VITCOD")
pytestmark = pytest.mark.skipif(ROOT is None, reason="VITRIFY_VITCOD names no checkout of GATECH-EIC/ViTCoD")
pytest.importorskip("scipy", reason="scipy is not installed, which ViTCoD's simulator imports")

SIMULATOR = Path(str(ROOT)) / "Hardware" / "Simulator"
AUTHORS = SIMULATOR / "masks" / "deit_tiny_lowrank"


def global_first(mask):
    """Return each head's mask with the columns of its global tokens moved to the front, and their number."""
    order = np.argsort(mask.sum(-2) <= 50, axis=-1, kind="stable")
    return np.take_along_axis(mask, order[..., None, :], -1), polarise(mask, 50).global_tokens


def reported(script, mask, folder, *arguments):
    """Run one of their scripts on a mask (layers, heads, queries, keys) and return what it reports by name."""
    ordered, tokens = global_first(mask)
    np.save(folder / "reodered_info_0.9.npy", (~ordered).astype(float))
    np.save(folder / "global_token_info_0.9.npy", tokens)
    command = [sys.executable, script, "--root", str(folder), "--sparse", "0.9", *arguments]
    ran = subprocess.run(command, cwd=SIMULATOR, capture_output=True, text=True, check=True)
    return {
        name.lower(): int(float(value)) for name, value in re.findall(r"(total [\w ]+): ([\d.]+)", ran.stderr, re.I)
    }


def first_heads(mask):
    """Return global tokens and the rest of the entries of head 0, layer by layer."""
    split = polarise(mask, 50)
    return list(zip(split.global_tokens[:, 0].tolist(), split.sparser[:, 0].tolist(), strict=True))


def masks(layers, heads, density):
    made = synthetic_masks([str(i) for i in range(layers)], heads, 197, density, seed=heads)
    mask = np.concatenate([layer.kept for layer in made.layers.values()])
    mask[:, 0, :, 0] = True  # their script divides by zero without a global token
    return mask


@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.2])
def test_attention(density, heads, tmp_path):
    mask = masks(2, heads, density)
    graph = vitrify.workload(VisionTransformer(embed_dim=64 * heads, num_heads=heads, depth=2))
    theirs = reported("ViTCoD.py", mask, tmp_path)
    ours = vitcod_attention_cycles(graph, first_heads(mask))
    assert ours.loads == theirs["total preloading cycles"]
    assert ours.codes == theirs["total processing cycles"]
    assert ours.compute == theirs["total computation cycles"]
    assert ours.total == theirs["total cycles"]


@pytest.mark.parametrize(("heads", "image"), [(3, 224), (6, 224), (12, 224), (3, 384)])
def test_projections_and_mlps(heads, image, tmp_path):
    tokens = (image // 16) ** 2 + 1
    graph = vitrify.workload(
        VisionTransformer(img_size=image, embed_dim=64 * heads, num_heads=heads, depth=2), (3, image, image)
    )
    mask = np.ones((2, heads, tokens, tokens), bool)
    theirs = reported("ViT_FFN.py", mask, tmp_path, "--embedding", str(64 * heads))
    linear, mlp = vitcod_linear_cycles(graph), vitcod_ffn_cycles(graph)
    assert linear.compute == theirs["total linear computation cycles"]
    assert linear.codes == theirs["total linear preprocessing cycles"]
    assert linear.loads == theirs["total linear preloading cycles"]
    assert mlp.compute == theirs["total ffn computation cycles"]
    assert mlp.loads == theirs["total ffn preloading cycles"]
    assert (linear.total, mlp.total) == (theirs["total linear cycles"], theirs["total ffn cycles"])


@pytest.mark.skipif(not (AUTHORS / "info_0.95.npy").exists(), reason="the checkout has no masks/deit_tiny_lowrank")
def test_the_published_figure_on_the_authors_mask(tmp_path):
    mask = ~np.load(AUTHORS / "info_0.95.npy")
    published = np.load(AUTHORS / "global_token_info_0.95.npy")
    assert (polarise(mask).global_tokens == published).all()
    graph = vitrify.workload(VisionTransformer(embed_dim=192, num_heads=3))
    assert vitcod_attention_cycles(graph, first_heads(mask)).total == 9492
    assert reported("ViTCoD.py", mask, tmp_path)["total cycles"] == 9492
