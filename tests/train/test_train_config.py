from __future__ import annotations

import pytest

from vitrify.errors import InputError
from vitrify.train import TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("epochs", 0), ("epochs", 1.5), ("batch_size", True), ("max_steps", 0), ("seed", -1), ("limit_train", "9")],
        *[("lr", 0), ("lr", float("nan")), ("min_lr", 1), ("label_smoothing", 1), ("ema_decay", -0.1)],
        *[("distill_alpha", 1.1), ("clip_grad", "x"), ("warmup_epochs", 99), ("weight_decay", float("inf"))],
        *[("amp", "bf61"), ("objective", "label"), ("threshold_schedule", "raising")],
    ],
)
def test_bad_value_is_named(field, value):
    with pytest.raises(InputError, match=field) as error:
        TrainConfig(**{field: value})
    assert str(value) in str(error.value)


def test_round_trip_and_unknown_key():
    config = TrainConfig(epochs=3, amp="bf16", max_steps=7)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        TrainConfig.from_dict({"batchsize": 3})


def test_resuming_names_every_changed_field_but_lets_the_harmless_ones_go():
    stored = TrainConfig().to_dict()
    TrainConfig(num_workers=4, checkpoint_every_s=1, log_every=7).check_resumes(stored, "runs/a")
    with pytest.raises(InputError, match=r"runs/a.*lr was 0\.0005, is now 0\.001; seed was 0, is now 3"):
        TrainConfig(lr=1e-3, seed=3).check_resumes(stored, "runs/a")
