import dataclasses
import json

import pytest
import torch
from ball_scenes import make_scene
from tiny_gnt import SIZE, tiny

from vitrify import convert_, recipes
from vitrify.errors import InputError
from vitrify.nvs import metrics
from vitrify.nvs.evaluate import BASELINES, claim, evaluate, picture_file, renderer, summary
from vitrify.nvs.pictures import read_png
from vitrify.nvs.routing import routing_maps
from vitrify.nvs.shipped import shipped_models

SCENE = make_scene(0, views=10, **SIZE)  # views 0 and 8 are held out
pytestmark = pytest.mark.skipif(
    metrics.find_spec("skimage") is None, reason="scikit-image is not installed (extra nvs)"
)


def test_records_and_pictures(tmp_path):
    given = []

    def spy(scene, target, sources):
        given.append((target.name, sources))
        return target.rgb() * 0.5

    records = evaluate("my renderer", spy, SCENE, tmp_path, sources=3)
    assert given == [("0", [1, 2, 3]), ("8", [9, 7, 6])]
    for record, index in zip(records, (0, 8), strict=True):
        truth = SCENE.views[index].rgb()
        assert record["psnr"] == pytest.approx(metrics.psnr(truth * 0.5, truth))
        assert record["ssim"] == pytest.approx(metrics.ssim(truth * 0.5, truth))
        place = tmp_path / "ball0" / str(index)
        assert sorted(path.name for path in place.iterdir()) == [
            "my-renderer-error.png", "my-renderer.json", "my-renderer.png", "truth.png",
        ]  # fmt: skip
        shown = read_png(picture_file(tmp_path, "ball0", str(index), "my renderer"))
        assert (shown - truth * 0.5).abs().max() < 0.003


def test_a_stopped_evaluation_goes_on(tmp_path):
    calls = []

    def failing(scene, target, sources):
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return target.rgb()

    with pytest.raises(KeyboardInterrupt):
        evaluate("r", failing, SCENE, tmp_path, sources=2)
    records = evaluate("r", failing, SCENE, tmp_path, sources=2)
    assert calls == ["0", "8", "8"]
    assert [record["view"] for record in records] == ["0", "8"]
    assert evaluate("r", failing, SCENE, tmp_path, sources=2) == records
    assert len(calls) == 3


def test_records_of_other_views_and_damaged_ones_are_not_taken(tmp_path):
    evaluate("r", BASELINES["nearest view"], SCENE, tmp_path, sources=2)
    # Another scene of the same name, as of another folder.
    other = dataclasses.replace(make_scene(1, views=10, **SIZE), name=SCENE.name)
    with pytest.raises(InputError, match=r"truth\.png is not view '0', but another of that name"):
        evaluate("r", BASELINES["nearest view"], other, tmp_path, sources=2)
    record = tmp_path / "ball0" / "8" / "r.json"
    for content, message in (("{", "cannot read"), ("3", "cannot read"), ('{"scene": "ball0"}', "has no psnr")):
        record.write_text(content)
        with pytest.raises(InputError, match=message):
            evaluate("r", BASELINES["nearest view"], SCENE, tmp_path, sources=2)
    record.unlink()
    assert len(evaluate("r", BASELINES["nearest view"], SCENE, tmp_path, sources=2)) == 2


def test_a_model_has_depth_and_says_what_is_unseen(tmp_path):
    (record,) = evaluate("gnt", renderer(tiny()), SCENE, tmp_path, sources=3, views=[8])
    assert 0 <= record["unseen"] <= 1
    assert record["seconds"] > 0
    depth = read_png(picture_file(tmp_path, "ball0", "8", "gnt", "-depth"))
    assert depth.shape == (24, 32)


def test_only_held_out_views_are_targets(tmp_path):
    with pytest.raises(InputError, match=r"view 3 is not held out; these are: \[0, 8\]"):
        evaluate("r", BASELINES["nearest view"], SCENE, tmp_path, sources=2, views=[8, 3])


def test_means_are_of_views_then_of_scenes():
    rows = [("a", 10), ("a", 20), ("b", 30)]
    records = [{"scene": s, "renderer": "r", "psnr": p, "ssim": p / 100} for s, p in rows]
    assert summary(records) == {"r": {"psnr": pytest.approx(22.5), "ssim": pytest.approx(0.225)}}


def test_a_folder_belongs_to_its_settings(tmp_path):
    claim(tmp_path / "a", {"weights": "x", "sources": 8})
    claim(tmp_path / "a", {"weights": "x", "sources": 8})
    with pytest.raises(InputError, match="sources was 8, is now 4"):
        claim(tmp_path / "a", {"weights": "x", "sources": 4})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").touch()
    with pytest.raises(InputError, match="choose another folder"):
        claim(tmp_path / "b", {})
    (tmp_path / "a" / "settings.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*settings\.json"):
        claim(tmp_path / "a", {})


def test_routing_maps_show_what_each_point_does():
    model = tiny(depth=3)
    with pytest.raises(InputError, match="no mixture"):
        routing_maps(model, SCENE, SCENE.views[0], [1, 2])
    convert_(model, recipes.vitrify())
    maps = routing_maps(model, SCENE, SCENE.views[0], [1, 2], chunk=100)
    whole = routing_maps(model, SCENE, SCENE.views[0], [1, 2], chunk=10_000)
    # The last block of three has a mixture that the depth map calls once more.
    assert "coarse.blocks.2.ray.place" in maps
    for name, multiplies in maps.items():
        assert multiplies.shape == (24, 32, 8)
        assert multiplies.dtype == torch.bool
        assert torch.equal(multiplies, whole[name])
        recorded = model.get_submodule(name).share[0].item()
        if not name.endswith("2.ray.place"):  # counted twice there
            assert whole[name].float().mean().item() == pytest.approx(recorded, abs=1e-5)


def test_all_to_one_expert():
    model = tiny()
    convert_(model, recipes.vitrify())
    name = "coarse.blocks.0.view.mlp"
    router = model.get_submodule(name).router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([1.0, 0.0]))
    assert routing_maps(model, SCENE, SCENE.views[0], [1, 2])[name].all()
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.0, 1.0]))
    assert not routing_maps(model, SCENE, SCENE.views[0], [1, 2])[name].any()


def test_artefacts_of_a_folder_by_name(tmp_path):
    for folder in ("gnt-taylor", "gnt", "run/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"format": "vitrify-artefact"}))
    (tmp_path / "other").mkdir()
    assert list(shipped_models(tmp_path)) == ["gnt", "gnt-taylor", "run"]
    assert shipped_models(tmp_path)["run"] == tmp_path / "run" / "model"
