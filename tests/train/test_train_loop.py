from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
from tiny_training import Blobs, assert_same_bits, quick, sparse, tiny_vit, train, weights
from torch import nn

from vitrify import artefact
from vitrify.errors import InputError, VitrifyError
from vitrify.train import LabelsTask, Task, finetune, make_task, read_metrics
from vitrify.train.features import logits_of
from vitrify.train.optimizer import build_optimizer


@pytest.mark.parametrize("recipe", [None, sparse()], ids=["plain timm model", "converted"])
def test_learns_and_leaves_an_artefact_equal_to_the_model(tmp_path, recipe):
    model = tiny_vit(recipe)
    path = train(model, quick(epochs=6, lr=1e-2), tmp_path)
    assert path == tmp_path / "model"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == list(range(1, 7))
    assert epochs[0]["eval"]["top1"] < epochs[-1]["eval"]["top1"] == 1.0
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert not model.training
    images = torch.stack([Blobs(4)[i][0] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(artefact.load(path)(images), model(images))


def test_metrics_hold_rate_threshold_and_density_of_each_layer(tmp_path):
    train(tiny_vit(sparse(0.05)), quick(threshold_schedule="rising", epochs=5), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    names = ["blocks.0.attn.core", "blocks.1.attn.core"]
    assert list(lines[0]["density"]) == list(lines[0]["threshold"]) == names
    assert lines[0]["density"][names[0]] == 1  # the first tenth is softmax
    assert 0 < lines[3]["density"][names[0]] <= 1
    assert lines[-1]["density"][names[1]] == 0  # and the last quarter Taylor
    assert all(0 < line["lr"] <= 1e-3 and line["images_per_s"] > 0 for line in lines)


def test_every_kind_of_randomness_comes_from_the_seed(tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(runs))  # the state of the caller's generators must not matter
        runs.append(weights(train(tiny_vit(), quick(seed=seed, mixup=0.5, cutmix=0.5), tmp_path / name)))
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["head.weight"], runs[2]["head.weight"])


def test_worker_processes_and_gradient_checkpointing_change_nothing(tmp_path):
    plain = weights(train(tiny_vit(sparse()), quick(max_steps=3), tmp_path / "plain"))
    other = weights(
        train(tiny_vit(sparse()), quick(max_steps=3, num_workers=2, grad_checkpointing=True), tmp_path / "other")
    )
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_bf16_after_a_float32_run_in_the_same_process(tmp_path):
    single = weights(train(tiny_vit(), quick(), tmp_path / "single"))
    mixed = weights(train(tiny_vit(), quick(amp="bf16"), tmp_path / "mixed"))
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert not torch.equal(single["head.weight"], mixed["head.weight"])
    torch.testing.assert_close(single["head.weight"], mixed["head.weight"], rtol=0.2, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp16_keeps_its_loss_scale_over_a_resume(tmp_path):
    class Stopping(LabelsTask):
        steps = 0

        def loss(self, model, batch, teacher):
            self.steps += 1
            if self.steps == 6:
                raise ConnectionAbortedError
            return super().loss(model, batch, teacher)

    config = quick(amp="fp16", epochs=3)
    with pytest.raises(ConnectionAbortedError):
        finetune(tiny_vit(sparse()), Stopping(config, Blobs(32)), config, tmp_path)
    state = next((tmp_path / "checkpoint").glob("*/state.json"))
    saved = json.loads(state.read_text())
    assert saved["scaler"]["scale"] > 1024  # 65,536 at first, halved at every overflow
    saved["scaler"]["scale"] = 1024.0
    state.write_text(json.dumps(saved))
    train(tiny_vit(sparse()), config, tmp_path)
    state = next((tmp_path / "checkpoint").glob("*/state.json"))
    assert json.loads(state.read_text())["scaler"]["scale"] <= 1024


def test_averaged_weights_are_what_is_evaluated_and_saved(tmp_path):
    seen = []

    class Recording(LabelsTask):
        def loss(self, model, batch, teacher):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            return super().loss(model, batch, teacher)

    config = quick(ema_decay=0.6, epochs=1)
    model = tiny_vit()
    final = weights(finetune(model, Recording(config, Blobs(32)), config, tmp_path))
    raw = [state["head.weight"] for state in seen[1:]]
    # After step 1 the weights themselves, then a share of 1 - min(0.6, 1 - step^(-2/3)) of the new ones; the weights
    # after the last step are not seen by any loss, but they follow from the average.
    average = raw[0]
    for step, value in enumerate(raw[1:], 2):
        average = average.lerp(value, 1 - min(0.6, 1 - step ** (-2 / 3)))
    last = (final["head.weight"] - average) / (1 - min(0.6, 1 - 4 ** (-2 / 3))) + average
    assert (last - raw[-1]).abs().max() < 1.5e-3  # one step of AdamW at this rate
    assert torch.equal(model.state_dict()["head.weight"], final["head.weight"])


def test_limits(tmp_path):
    seen = set()

    class Counting(Blobs):
        def __getitem__(self, index):
            seen.add(index)
            return super().__getitem__(index)

    config = quick(limit_train=16, epochs=3)
    finetune(tiny_vit(), make_task(config, Counting(64)), config, tmp_path / "a")
    assert len(seen) == 16
    assert max(seen) > 16  # drawn from all
    train(tiny_vit(), quick(max_steps=5), tmp_path / "b")
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[-1]["step"] == 5


def test_a_complete_run_is_loaded_and_not_trained_again(tmp_path, capsys):
    path = train(tiny_vit(), quick(), tmp_path)
    before = weights(path)
    again = tiny_vit()
    assert train(again, quick(num_workers=1), tmp_path) == path
    assert "complete" in capsys.readouterr().err
    assert_same_bits(weights(path), before)
    assert_same_bits(dict(again.state_dict()), before)
    with pytest.raises(InputError, match=r"lr was 0\.001, is now 0\.01"):
        train(tiny_vit(), quick(lr=0.01), tmp_path)
    with pytest.raises(InputError, match="another recipe"):
        train(tiny_vit(sparse()), quick(), tmp_path)
    with pytest.raises(InputError, match=r"another initial weights: '[0-9a-f]{16}', now '[0-9a-f]{16}'"):
        train(tiny_vit(seed=5), quick(), tmp_path)
    assert_same_bits(weights(path), before)
    changed = weights(train(tiny_vit(), quick(lr=0.01), tmp_path, resume="never"))
    assert not torch.equal(changed["head.weight"], before["head.weight"])
    assert json.loads((tmp_path / "config.json").read_text())["config"]["lr"] == 0.01


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_rate(tmp_path):
    class Exploding(LabelsTask):
        steps = 0

        def loss(self, model, batch, teacher):
            self.steps += 1
            loss, logs = super().loss(model, batch, teacher)
            return (loss * math.nan if self.steps == 3 else loss), logs

    config = quick(warmup_epochs=0, checkpoint_every_s=0)
    with pytest.raises(VitrifyError, match=r"nan at step 3 of 8, at a learning rate of 0\.000854"):
        finetune(tiny_vit(), Exploding(config, Blobs(32)), config, tmp_path)
    assert not (tmp_path / "model").exists()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000002"]


def test_auxiliary_losses_of_modules_are_minimised_and_logged(tmp_path):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.value = self.weight.square().sum()
            return x

        def aux_losses(self):
            return {"balance": self.value}

    model = tiny_vit()
    model.norm_pre = Gate()
    train(model, quick(epochs=3, lr=0.1), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    assert lines[-1]["aux/norm_pre.balance"] < 0.7 * lines[0]["aux/norm_pre.balance"]
    assert lines[0]["loss"] > lines[0]["aux/norm_pre.balance"]


def test_decay_spares_what_it_should():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 4, 8))
            self.named = nn.Parameter(torch.ones(2, 2))
            self.mlp = nn.Linear(8, 8)
            self.router = nn.Linear(8, 2)
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

        def no_weight_decay(self):
            return {"named"}

    model = Model()
    decayed, spared = build_optimizer(model, 0.1, 0.05).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.mlp.weight)]
    assert spared["weight_decay"] == 0
    names = {"pos_embed", "named", "mlp.bias", "router.weight", "router.bias"}
    assert {id(p) for p in spared["params"]} == {id(p) for n, p in model.named_parameters() if n in names}
    with pytest.raises(InputError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), 0.1, 0.05)


def test_softmax_runs_unfused_while_training_on_a_cpu_and_as_before_afterwards(tmp_path):
    model = tiny_vit()
    fused = []
    model.blocks[0].register_forward_hook(lambda block, *_: fused.append((block.training, block.attn.fused_attn)))
    model.blocks[0].attn.fused_attn = True
    train(model, quick(max_steps=2), tmp_path)
    assert (True, False) in fused
    assert (True, True) not in fused
    assert model.blocks[0].attn.fused_attn is True


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "run"
    for changes, message in (
        ({"batch_size": 33}, "batch_size 33 is more than the 32 training images"),
        ({"batch_size": 7, "mixup": 0.2}, "must be even"),
        ({"objective": "features"}, "needs the unconverted model: pass teacher="),
        ({"amp": "fp16"}, "amp='fp16' needs a GPU"),
    ):
        if "fp16" in message and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=message):
            train(tiny_vit(sparse()), quick(**changes), folder)
    model = tiny_vit(sparse())
    with pytest.raises(InputError, match="shares weights"):
        train(model, quick(objective="distill"), folder, teacher=model)
    assert not folder.exists()


def test_outputs_that_do_not_match_the_classes(tmp_path):
    with pytest.raises(InputError, match="7 outputs and the data set 4 classes: create the model with num_classes=4"):
        train(tiny_vit(num_classes=7), quick(), tmp_path)


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the output folder"):
        train(tiny_vit(), quick(), tmp_path / "file" / "run")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not an artefact"):
        train(tiny_vit(), quick(), tmp_path / "run", resume="never")
    assert (tmp_path / "run" / "model" / "thesis.tex").exists()


def test_the_trainer_knows_nothing_of_classes(tmp_path):
    class Brightness(Task):
        train_dataset, eval_dataset = Blobs(32), Blobs(6)

        def loss(self, model, batch, teacher):
            loss = (logits_of(model, batch[0])[:, 0] - batch[0].mean((1, 2, 3))).square().mean()
            return loss, {}

        def measure(self, model, batch, teacher):
            return {"index": batch[1], "three": torch.full_like(batch[1], 3)}

    finetune(tiny_vit(), Brightness(), quick(epochs=4, lr=1e-2, batch_size=4), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["eval"] == {"index": pytest.approx((0 + 1 + 2 + 3 + 0 + 1) / 6), "three": 3}


def test_tensorboard_gets_every_number_by_name(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    train(tiny_vit(sparse()), quick(tensorboard=True, epochs=1), tmp_path)
    assert written[0] == (str(tmp_path / "tensorboard"), 1)
    assert written[-1] == "closed"
    epoch = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert ("epoch/eval/top1", epoch["eval"]["top1"], 4) in written
    assert ("epoch/density/blocks.1.attn.core", epoch["density"]["blocks.1.attn.core"], 4) in written


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"vitrify\[tensorboard\]"):
        train(tiny_vit(), quick(tensorboard=True), tmp_path)
