from __future__ import annotations

import copy

import pytest
import timm
import torch
from tiny_training import Blobs, quick, sparse, tiny_vit
from torch import nn
from torch.utils.data import DataLoader

from vitrify.convert import Recipe, convert_
from vitrify.errors import InputError, UnsupportedError
from vitrify.train import (
    DistillTask,
    FeaturesTask,
    converted_blocks,
    encode,
    evaluate_against,
    finetune,
    make_task,
    read_metrics,
)
from vitrify.train.features import BlockFeatures, feature_loss

TAYLOR = Recipe(attention="taylor", keep_if_costlier=False)


def strong_vit(**changes):
    """An encoder whose attention is far from uniform, so that Taylor changes it visibly."""
    model = tiny_vit(**changes)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(30)
    return model


def pair(**changes):
    original = strong_vit(**changes)
    model = copy.deepcopy(original)
    convert_(model, sparse())
    return original, model


def test_blocks_of_timm_families():
    assert converted_blocks(tiny_vit()) == []
    assert converted_blocks(tiny_vit(TAYLOR)) == ["blocks.0", "blocks.1"]
    pvt = timm.create_model("pvt_v2_b0")
    convert_(pvt, TAYLOR)
    assert converted_blocks(pvt) == [f"stages.{stage}.blocks.{i}" for stage in range(4) for i in range(2)]


def test_blocks_of_levit_are_its_attentions_and_its_downsampling_stages():
    levit = timm.create_model("levit_128s")
    convert_(levit, TAYLOR)
    blocks = converted_blocks(levit)
    assert "stages.0.blocks.0" in blocks
    assert all(name in dict(levit.named_modules()) for name in blocks)
    assert {"stages.1", "stages.2"} <= set(blocks)  # their down-sampling comes first


def test_a_bare_attention_is_its_own_block():
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Identity(), timm.layers.Attention(16, num_heads=2))
    convert_(model, TAYLOR)
    assert converted_blocks(model) == ["encoder.1"]


def test_block_features_are_the_outputs_and_the_hooks_go():
    model = tiny_vit(TAYLOR).eval()
    images = torch.randn(2, 3, 8, 8)
    with BlockFeatures(model, ["blocks.0", "blocks.1"]) as blocks:
        tokens, _ = encode(model, images)
    assert blocks.outputs["blocks.0"].shape == (2, 17, 16)
    assert torch.equal(model.norm(blocks.outputs["blocks.1"]), tokens)
    blocks.outputs.clear()
    model(images)
    assert not blocks.outputs


def test_encode_gives_tokens_and_what_the_model_pools():
    images = torch.randn(2, 3, 8, 8)
    headless = tiny_vit(num_classes=0).eval()
    tokens, pooled = encode(headless, images)
    assert tokens.shape == (2, 17, 16)
    assert torch.equal(pooled, headless(images))
    maps = timm.create_model("pvt_v2_b0").eval()
    tokens, pooled = encode(maps, torch.randn(1, 3, 64, 64))
    assert tokens.shape == (1, 4, 256)
    torch.testing.assert_close(pooled, tokens.mean(1))
    with pytest.raises(UnsupportedError, match="Linear has neither"):
        encode(nn.Linear(8, 8), images)


@pytest.mark.parametrize("name", ["Dinov2Model", "ViTForImageClassification"])
def test_hugging_face_encoders_recover_too(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    original = model_class(model_class.config_class(**sizes, image_size=8, patch_size=2)).eval()
    for parameter in original.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 8, 8)
    tokens, pooled = encode(original, images)
    assert torch.equal(tokens, original.base_model(images).last_hidden_state)
    assert tokens.shape == (2, 17, 16)
    assert pooled.shape == (2, 16)
    model = copy.deepcopy(original)
    convert_(model, sparse())
    assert len(converted_blocks(model)) == 2
    config = quick(objective="features", grad_checkpointing=True, epochs=6, lr=3e-3)
    task = make_task(config, Blobs(32, labelled=False), Blobs(16, labelled=False))
    before = task.evaluate(model, DataLoader(task.eval_dataset, batch_size=8), original)
    finetune(model, task, config, tmp_path, teacher=original)
    after = read_metrics(tmp_path / "metrics.jsonl")[-1]["eval"]
    assert 1 - after["token_cosine"] < 0.7 * (1 - before["token_cosine"])


def test_feature_loss_is_relative():
    wanted = 1000 + 5 * torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0))
    assert feature_loss(wanted, wanted) == 0
    assert float(feature_loss(wanted.mean((0, 1)).expand_as(wanted), wanted)) == pytest.approx(1, rel=1e-4)
    with pytest.raises(InputError, match=r"\(4, 49, 8\) differ from the teacher's \(4, 50, 8\)"):
        feature_loss(wanted[:, 1:], wanted)


@pytest.mark.parametrize("num_classes", [0, 4])
def test_features_objective_recovers_an_encoder_from_images_without_labels(tmp_path, num_classes):
    original, model = pair(num_classes=num_classes)
    config = quick(objective="features", epochs=8, lr=3e-3)
    task = make_task(config, Blobs(32, labelled=False), Blobs(16, labelled=False))
    loader = DataLoader(task.eval_dataset, batch_size=8)
    before = task.evaluate(model, loader, original)
    head = [p.clone() for p in model.head.parameters()]
    finetune(model, task, config, tmp_path, teacher=original)
    after = task.evaluate(model, loader, original)
    assert before["token_cosine"] < after["token_cosine"]
    assert 1 - after["token_cosine"] < 0.5 * (1 - before["token_cosine"])
    assert all(torch.equal(a, b) for a, b in zip(head, model.head.parameters(), strict=True))
    first, *_, last = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    assert last["blocks"] < first["blocks"]
    assert set(last["eval"]) == {"token_cosine", "pooled_cosine"}


def test_teacher_is_never_trained(tmp_path):
    original, model = pair()
    before = copy.deepcopy(original.state_dict())
    config = quick(objective="distill", distill_features_weight=1.0)
    finetune(model, make_task(config, Blobs(32)), config, tmp_path, teacher=original)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(p.grad is None for p in original.parameters())
    assert not original.training


def test_distillation_terms_add_up():
    original, model = pair(proj_drop_rate=0, drop_path_rate=0)
    batch = next(iter(DataLoader(Blobs(8), batch_size=8)))

    def loss(**changes):
        config = quick(objective="distill", label_smoothing=0, **changes)
        with torch.no_grad():
            return DistillTask(config, Blobs(8)).loss(model.train(), batch, original.eval())

    labels, kl = loss(distill_alpha=0)[0], loss(distill_alpha=1)[0]
    with torch.no_grad():
        p, q = original(batch[0]).softmax(1), model(batch[0]).softmax(1)
    assert float(kl) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3, abs=1e-6)
    assert float(labels) == pytest.approx(float(-q[range(8), batch[1]].log().mean()), rel=1e-5)
    mixed, logs = loss(distill_alpha=0.25, distill_features_weight=2.0)
    assert float(mixed) == pytest.approx(float(0.75 * labels + 0.25 * kl + 2 * logs["blocks"]), rel=1e-5)
    assert logs["blocks"] > 0
    assert float(DistillTask(quick(), Blobs(8)).loss(original, batch, original)[1]["kl"]) == pytest.approx(0, abs=1e-6)


def test_objectives_that_cannot_be(tmp_path):
    unlabelled = Blobs(32, labelled=False)
    for objective in ("labels", "distill"):
        with pytest.raises(InputError, match=r"needs labels.*'features'"):
            make_task(quick(objective=objective), unlabelled)
    original, model = pair()
    config = quick(objective="distill", distill_alpha=1.0)
    finetune(model, make_task(config, unlabelled), config, tmp_path / "teacher alone", teacher=original)
    config = quick(objective="features")
    with pytest.raises(InputError, match="no attention of this model is converted"):
        finetune(strong_vit(), FeaturesTask(config, unlabelled), config, tmp_path / "plain", teacher=original)


def test_fidelity_of_a_copy_is_perfect_and_of_a_conversion_is_not():
    original, model = pair()
    loader = DataLoader(Blobs(24), batch_size=10)
    original.train()
    torch.manual_seed(0)
    same = evaluate_against(original, copy.deepcopy(original), loader, k=3)
    assert original.training
    perfect = ("token_cosine_mean", "token_cosine_min", "pooled_cosine_min", "knn_overlap", "nearest_agreement")
    assert [same[name] for name in perfect] == [pytest.approx(1)] * 5
    assert same["knn_accuracy_original"] == same["knn_accuracy_model"] > 0.6  # colours are easily told apart
    assert same["images"] == 24
    other = evaluate_against(original, model, loader, k=3)
    assert other["token_cosine_min"] < other["token_cosine_mean"] < 0.999
    assert other["knn_overlap"] < 1
    unlabelled = evaluate_against(original, model, DataLoader(Blobs(24, labelled=False), batch_size=24), k=3)
    assert "knn_accuracy_model" not in unlabelled
    with pytest.raises(InputError, match="needs at least 25 images, not 24"):
        evaluate_against(original, model, loader, k=24)


def test_neighbours_against_a_naive_search():
    class Lookup(nn.Module):
        """Looks features up: pixel 0 holds the index."""

        def __init__(self, table):
            super().__init__()
            self.table = nn.Parameter(table)

        def forward_features(self, x):
            return self.table[x[:, 0, 0, 0].long()][:, None]

        def forward_head(self, tokens, pre_logits):
            return tokens[:, 0]

    torch.manual_seed(0)
    tables = torch.randn(2, 30, 5)
    images = torch.arange(30.0).reshape(30, 1, 1, 1)
    got = evaluate_against(Lookup(tables[0]), Lookup(tables[1]), DataLoader(images, batch_size=7), k=4)
    near = []
    for table in tables:
        cosines = torch.cosine_similarity(table[:, None], table[None], dim=2).fill_diagonal_(-2)
        near.append([sorted(range(30), key=lambda j, row=row: -row[j])[:4] for row in cosines.tolist()])
    overlap = sum(len(set(a) & set(b)) for a, b in zip(*near, strict=True)) / 120
    assert got["knn_overlap"] == pytest.approx(overlap)
    assert got["nearest_agreement"] == pytest.approx(sum(a[0] == b[0] for a, b in zip(*near, strict=True)) / 30)
    assert got["pooled_cosine_mean"] == pytest.approx(float(torch.cosine_similarity(*tables).mean()), abs=1e-6)
