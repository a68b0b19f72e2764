"""`vitrify eval` on damaged images, on encoders without a classifier, and against a finished run."""

import json
import shutil

import pytest
import torch
from PIL import Image

import vitrify
from vitrify.cli import finetune, main
from vitrify.cli.options import open_data
from vitrify.errors import InputError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "linear"
    assert main(["convert", "vit_mini_patch2_28", "--pretrained", "--output", str(folder)]) == 0
    return folder


def write_images(folder, count, seed=0):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        pixels = torch.randint(0, 256, (28, 28), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    return folder


def truncate(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])


def result_of(arguments, tmp_path):
    file = tmp_path / "result.json"
    assert main([*map(str, arguments), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def measured(result):
    return {key: result[key] for key in ("images", "agreement", "accuracy", "accuracy_original") if key in result}


def test_skipped_images_count_for_nothing(artefact, tmp_path, capsys):
    """With bad files it measures what it measures where these files do not exist."""
    photos = write_images(tmp_path / "photos", 24)
    bad = [photos / f"{index:02}.png" for index in (3, 4, 23)]
    given = ["--against", "original", "--on-error", "skip"]
    truncate(*bad)
    found = result_of(["eval", artefact, "--data", photos, *given], tmp_path)
    printed = capsys.readouterr()
    assert "21 images used" in printed.out
    assert [line.split(":")[0].split()[-1] for line in printed.err.splitlines() if "skipped" in line] == [
        *map(str, bad)
    ]
    assert [skipped["path"] for skipped in found["skipped"]] == [*map(str, bad)]
    for path in bad:
        path.unlink()
    clean = result_of(["eval", artefact, "--data", photos, *given], tmp_path)
    assert clean["skipped"] == []
    assert found["images"] == clean["images"] == found["agreement"]["images"] == 21
    assert found["agreement"]["knn_overlap"] < 1
    assert measured(found) == measured(clean)


def test_accuracy_is_of_the_images_that_were_read(artefact, tmp_path):
    data = tmp_path / "data"
    for label in range(10):
        folder = write_images(data / f"class{label}", 4, seed=label)
        truncate(*sorted(folder.iterdir())[: label % 4])
    found = result_of(["eval", artefact, "--data", data, "--on-error", "skip"], tmp_path)
    assert found["images"] == 40 - 13
    assert (found["accuracy"] / 100 * 27) == pytest.approx(round(found["accuracy"] / 100 * 27))
    for skipped in found["skipped"]:
        (data / skipped["path"]).unlink()
    assert measured(result_of(["eval", artefact, "--data", data], tmp_path)) == measured(found)


def test_limit_takes_its_images_before_the_bad_are_left_out(artefact, tmp_path):
    photos = write_images(tmp_path / "photos", 24)
    truncate(photos / "01.png", photos / "02.png")
    given = ["--against", "original", "--on-error", "skip", "--limit", "12"]
    found = result_of(["eval", artefact, "--data", photos, *given], tmp_path)
    assert found["images"] == 11
    assert [skipped["path"] for skipped in found["skipped"]] == [str(photos / "02.png")]


def test_a_bad_image_stops_it_unless_skipped(artefact, tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 12)
    truncate(photos / "03.png")
    assert main(["eval", str(artefact), "--data", str(photos), "--against", "original"]) == 2
    assert "03.png" in capsys.readouterr().err


def test_an_encoder_without_classifier_is_compared_on_labelled_images(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=64, **sizes)
    transformers.ViTModel(config).save_pretrained(tmp_path / "hf")
    linear, data = tmp_path / "linear", tmp_path / "data"
    assert main(["convert", f"hf:{tmp_path / 'hf'}", "--pretrained", "-o", str(linear)]) == 0
    for label in range(2):
        write_images(data / f"class{label}", 6, seed=label)
    found = result_of(["eval", linear, "--data", data, "--against", "original"], tmp_path)
    assert "accuracy" not in found
    assert found["agreement"]["knn_accuracy_model"] == found["agreement"]["knn_accuracy_original"]
    capsys.readouterr()
    assert main(["eval", str(linear), "--data", str(data)]) == 2
    assert "without a classifier, give --against original" in capsys.readouterr().err


def test_a_finished_run_stands_for_its_model(artefact, tmp_path):
    """As MODEL, to --against, and to finetune's --teacher."""
    run, photos = tmp_path / "run", write_images(tmp_path / "photos", 12)
    run.mkdir()
    shutil.copytree(artefact, run / "model")
    found = result_of(["eval", run, "--data", photos, "--against", run], tmp_path)
    assert found["agreement"]["knn_overlap"] == 1
    _, teacher = finetune.load_pair(str(artefact), str(run), {})
    assert torch.equal(teacher.head.weight, vitrify.load(artefact).head.weight)
    with pytest.raises(InputError, match="the folder of an artefact or of a finished run"):
        finetune.load_pair(str(artefact), str(photos), {})


def test_evaluation_while_training_leaves_bad_images_out_too(tmp_path):
    photos = write_images(tmp_path / "photos", 5)
    truncate(photos / "02.png")
    model = vitrify.create_model("vit_mini_patch2_28")
    assert len(open_data(str(photos), "test", model, on_error="skip")) == 4
    assert len(open_data(str(photos), "train", model, on_error="skip", augment="light")) == 5


def test_a_hardwares_widths_stand_beside_float(artefact, tmp_path, capsys):
    given = ["eval", artefact, "--data", "fashion-mnist:shipped", "--limit", "100"]
    plain = result_of(given, tmp_path)
    result = result_of([*given, "--hardware", "vitality"], tmp_path)
    assert result["accuracy"] == plain["accuracy"]
    assert abs(result["accuracy_hardware"] - result["accuracy"]) < 10
    hardware = result["hardware"]
    assert hardware["name"] == "vitality"
    assert hardware["widths"]["partial"] == 24
    assert set(hardware["cores"].values()) == {"Taylor attention, algorithm1"}
    printed = capsys.readouterr().out
    assert f"hardware  {result['accuracy_hardware']:.2f} %, at the widths of vitality" in printed
    assert "4 x Taylor attention, algorithm1" in printed


def test_without_labels_a_hardware_is_compared_with_float(artefact, tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 12)
    result = result_of(["eval", artefact, "--data", photos, "--hardware", "vitality"], tmp_path)
    assert result["agreement_hardware"]["pooled_cosine_mean"] > 0.95
    assert "compared with float, at the widths of vitality" in capsys.readouterr().out


def test_unknown_hardware_is_refused_before_any_work(artefact, capsys):
    assert main(["eval", str(artefact), "--data", "fashion-mnist:shipped", "--hardware", "vitalty"]) == 2
    assert "did you mean 'vitality'" in capsys.readouterr().err
