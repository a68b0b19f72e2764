"""The public simulators' published figures, and the faults that they come from."""

import numpy as np
import pytest
from timm.models.vision_transformer import VisionTransformer

import vitrify
from vitrify.accelerator.packing import load_balance
from vitrify.accelerator.published import (
    VitcodCycles,
    sanger_layer,
    sanger_load_balance,
    vitcod_attention_cycles,
    vitcod_ffn_cycles,
    vitcod_linear_cycles,
)
from vitrify.errors import InputError, UnsupportedError

# Of head 0 of each layer of the mask that ViTCoD's authors publish (DeiT-Tiny, 95 % sparse): the global tokens, and the
# entries kept outside their columns. The mask itself is theirs; `tests/peers/test_vitcod.py` reads it.
FIRST_HEADS = [
    (1, 2244),
    (1, 392),
    (70, 2479),
    (1, 936),
    (1, 1389),
    (20, 1785),
    (17, 1333),
    (1, 1551),
    (1, 454),
    (9, 771),
    (10, 1039),
    (31, 602),
]


@pytest.fixture(scope="module")
def deit_tiny():
    return vitrify.workload(VisionTransformer(embed_dim=192, num_heads=3))


@pytest.mark.parametrize(
    ("density", "load_balance", "tokens", "ms"),
    [
        (1, 1, 512, 1.573),
        (0.25, 0.8, 512, 1.100),
        (0.25, 1, 512, 1.057),
        (0.1, 0.8, 512, 0.971),
        (0.5, 0.8, 197, 0.448),
    ],
)
def test_sangers_points(density, load_balance, tokens, ms):
    assert sanger_layer(tokens, density, load_balance) == pytest.approx(ms, rel=1e-3)


def test_sanger_speeds_up_the_dense_output_projection():
    """All but the q, k, v projections shrinks with the density: a 2 n width^2 product that no mask touches among it."""
    full, sparse = sanger_layer(197, 1, 1), sanger_layer(197, 0.1, 1)
    fixed = 3 * 2 * 197 * 768**2 / 2.048e9
    assert sparse - fixed == pytest.approx((full - fixed) / 10)
    assert sanger_layer(197, 1, 1, width=192) < full


def test_sangers_load_balance_counts_idle_pes_within_sub_rows_only():
    mask = np.zeros((1, 64), bool)
    mask[0, :17] = True
    assert sanger_load_balance(mask) == 17 / 32
    assert load_balance(mask, 64, 16) == 17 / (64 * 16)
    mask[:] = True
    assert sanger_load_balance(mask) == 1


def test_vitcods_mlp_is_its_macs_on_512_pes(deit_tiny):
    cycles = vitcod_ffn_cycles(deit_tiny)
    macs = sum(op.macs for op in deit_tiny.operations if ".mlp." in op.module)
    assert cycles.total == macs / 512 == 1_361_664
    assert cycles.loads == 0  # below 512 tokens the weights are free


def test_vitcods_projections_are_rounded_head_by_head(deit_tiny):
    cycles = vitcod_linear_cycles(deit_tiny)
    macs = sum(op.macs for op in deit_tiny.operations if op.module.endswith((".attn.qkv", ".attn.proj")))
    assert macs / 512 == 680_832
    assert cycles == VitcodCycles(681_492, 0, 23_304)
    assert cycles.total + vitcod_ffn_cycles(deit_tiny).total == 2_043_156


def test_vitcods_attention_at_95_per_cent(deit_tiny):
    cycles = vitcod_attention_cycles(deit_tiny, FIRST_HEADS)
    assert cycles == VitcodCycles(compute=4709, codes=4728, loads=9492)
    assert cycles.total == 9492


def test_vitcods_loads_do_not_depend_on_the_mask(deit_tiny):
    """12 (4 n + 3): so is the published total of every mask that is sparse enough."""
    for first in ((1, 300), (2, 500), (30, 900)):
        assert vitcod_attention_cycles(deit_tiny, [first] * 12).loads == 12 * (4 * 197 + 3) == 9492


def test_wider_models_pay_for_the_codes():
    graph = vitrify.workload(VisionTransformer(embed_dim=768, num_heads=12, depth=1))
    assert vitcod_linear_cycles(graph).codes == 2 * 197 * (768 // 64)


@pytest.mark.parametrize(
    ("first_heads", "message"),
    [
        ([(1, 300)] * 11, "has 12 attention layers, but 11 masks are given"),
        ([(1, 300)] * 11 + [(0, 300)], "divides by zero in layer 11: 0 global tokens, 300 kept"),
        ([(197, 0)] + [(1, 300)] * 11, "divides by zero in layer 0: 197 global tokens, 0 kept"),
        ([(1, 38_000)] + [(1, 300)] * 11, "divides by zero in layer 0"),
    ],
)
def test_masks_that_vitcods_simulator_does_not_survive(deit_tiny, first_heads, message):
    with pytest.raises(InputError, match=message):
        vitcod_attention_cycles(deit_tiny, first_heads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sanger_layer(197, 0, 1), "density must be above 0 and at most 1, not 0"),
        (lambda: sanger_layer(197, 0.1, 1.2), "load_balance must be above 0 and at most 1, not 1.2"),
        (lambda: sanger_load_balance(np.ones((197, 197), bool)), "keys in multiples of 64, not 197"),
        (lambda: sanger_load_balance(np.zeros((64, 64), bool)), "keeps nothing"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_models_that_vitcods_simulator_does_not_know():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=1)
    with pytest.raises(UnsupportedError, match="not a batch of 2"):
        vitcod_ffn_cycles(vitrify.workload(model, (3, 32, 32), 2))
    vitrify.convert_(model, vitrify.recipes.taylor())
    with pytest.raises(UnsupportedError, match="has no softmax attention"):
        vitcod_linear_cycles(vitrify.workload(model, (3, 32, 32)))
