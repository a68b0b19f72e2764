from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_training import sparse, tiny_vit

from vitrify.convert import Recipe, convert_
from vitrify.errors import InputError
from vitrify.train import learning_rate, rising_threshold
from vitrify.train.schedule import RisingThreshold


def test_learning_rate_warms_up_then_follows_half_a_cosine():
    rates = [learning_rate(step, 20, 4, 1.0, 0.1) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.55)  # half-way between 4 and 20: the mean of peak and floor
    assert all(late < early for early, late in pairwise(rates[4:]))
    assert learning_rate(20, 20, 4, 1.0, 0.1) == pytest.approx(0.1)


def test_threshold_rises_from_softmax_through_multiples_of_uniform_to_nothing():
    assert rising_threshold(0.0, 197) == 0
    assert rising_threshold(0.1, 197) * 197 == pytest.approx(0.1)
    middle = rising_threshold(0.425, 100)
    assert middle == pytest.approx((0.001 * 0.1) ** 0.5)  # geometric mean of 0.1/n and 10/n
    assert rising_threshold(0.7499, 197) == pytest.approx(10 / 197, rel=0.01)
    assert rising_threshold(0.7499, 5) <= 1
    assert rising_threshold(0.75, 197) == rising_threshold(1.0, 197) > 1
    values = [rising_threshold(step / 100, 50) for step in range(101)]
    assert values == sorted(values)


def without_dropout(recipe):
    model = tiny_vit(recipe, proj_drop_rate=0, drop_path_rate=0)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(30)  # logits large enough for softmax and Taylor to differ
    return model


def test_rising_starts_at_softmax_and_ends_at_taylor():
    images = torch.randn(2, 3, 8, 8)
    model = without_dropout(sparse(0.3)).train()
    original = without_dropout(None).train()
    with RisingThreshold(model) as schedule, torch.no_grad():
        torch.testing.assert_close(model(images), original(images), rtol=1e-4, atol=1e-5)
        schedule.progress = 0.8
        in_training = model(images)
    core = model.blocks[0].attn.core
    assert float(core.density) == 0
    assert torch.equal(in_training, model.eval()(images))
    assert not torch.allclose(in_training, original.eval()(images), atol=1e-3)


def test_thresholds_follow_the_number_of_keys_and_leave_eval_and_later_use_alone():
    model = tiny_vit(sparse(0.3), dynamic_img_size=True)
    core = model.blocks[0].attn.core
    with RisingThreshold(model) as schedule, torch.no_grad():
        schedule.progress = 0.4
        model.eval()(torch.randn(1, 3, 8, 8))
        assert float(core.threshold) == pytest.approx(0.3)
        model.train()
        model(torch.randn(1, 3, 8, 8))
        assert float(core.threshold) == pytest.approx(rising_threshold(0.4, 17))
        model(torch.randn(1, 3, 8, 16))
        assert float(core.threshold) == pytest.approx(rising_threshold(0.4, 33))
    schedule.progress = 1
    model(torch.randn(1, 3, 8, 8))
    assert float(core.threshold) == pytest.approx(rising_threshold(0.4, 33))


@pytest.mark.parametrize("recipe", [None, "taylor", "sparse"])
def test_rising_needs_something_that_can_rise(recipe):
    model = tiny_vit()
    if recipe:
        convert_(model, Recipe(attention=recipe, keep_if_costlier=False))
    with pytest.raises(InputError, match="taylor_sparse"):
        RisingThreshold(model)
