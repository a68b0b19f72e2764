"""`vitrify nvs`: training, rendering, measuring and the demo, on tiny models and pictures."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import vitrify
from vitrify import convert_, recipes
from vitrify.cli import main
from vitrify.convert.copies import randomise
from vitrify.nvs import GNT, create, metrics, render

torch.set_num_threads(1)

WIDTH, HEIGHT = 32, 24
TINY = {"width": 16, "depth": 2, "points": 8, "frequencies": 2, "features": 4, "channels": (8, 8, 8), "squeeze": 4}
QUICK = ["--steps", "2", "--batch-size", "2", "--rays", "8"]
needs_skimage = pytest.mark.skipif(
    metrics.find_spec("skimage") is None, reason="scikit-image is not installed (extra nvs)"
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    # The command sets it for its own process; here it must not outlive the test.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def model(tmp_path):
    """The folder of a GNT with random weights."""
    gnt = create("gnt_small", **TINY)
    randomise(gnt, torch.Generator().manual_seed(0))
    return vitrify.save(gnt, tmp_path / "gnt")


def write_scene(folder, count=11, width=WIDTH, height=HEIGHT, tilt=1.0):
    """A NeRF-synthetic scene: cameras on a line, which look along -z (OpenGL axes)."""
    folder.mkdir()
    frames = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
        pose = np.diag([tilt, 1.0, 1.0, 1.0])
        pose[:3, 3] = 0.1 * index, 0.02 * index**2, 0
        frames.append({"file_path": f"{index:02}", "transform_matrix": pose.tolist()})
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 2 * math.atan(0.5), "frames": frames}))
    return folder


def nvs(*arguments):
    return main(["nvs", *map(str, arguments)])


def test_training_converts_measures_and_resumes(tmp_path, model, capsys):
    scene = write_scene(tmp_path / "line")
    command = ["train", model, "--scene", scene, "--recipe", "shiftaddvit", *QUICK, "--output", tmp_path / "run"]
    assert nvs(*command) == 0
    out, err = capsys.readouterr()
    assert "PSNR on held-out views" in out
    assert "9 views of line; 8 rays from 8 source views" in err
    assert "there is no product of Q and K to replace" in " ".join(err.replace("│", " ").split())
    trained = vitrify.load(tmp_path / "run" / "model")
    assert isinstance(trained, GNT)
    assert any("mlp" in change.name for change in trained._vitrify.changed)
    assert nvs(*command) == 0
    assert "nothing to train" in capsys.readouterr().err
    assert nvs(*command, "--lr", "0.1") == 2
    assert "lr was 0.001, is now 0.1" in capsys.readouterr().err


def test_training_from_scratch_with_a_teacher_and_codes(tmp_path, model, capsys):
    scene = write_scene(tmp_path / "line")
    file = tmp_path / "codes.yaml"
    file.write_text("name: codes\nattention: {core: hamming}\nmin_tokens: 0\nkeep_if_costlier: false\n")
    rest = ["--scene", scene, *QUICK]
    assert nvs("train", model, *rest, "--recipe", file, "--objective", "distill", "--output", tmp_path / "codes") == 0
    log = (tmp_path / "codes" / "metrics.jsonl").read_text()
    assert "teacher_psnr" in log
    assert nvs("train", "gnt_small", "--scratch", *rest, "--output", tmp_path / "scratch") == 0
    assert vitrify.load(tmp_path / "scratch" / "model").architecture == create("gnt_small").architecture


def test_fewer_views_than_sources(tmp_path, model, capsys):
    scene = write_scene(tmp_path / "line", count=4)
    assert nvs("train", model, "--scene", scene, *QUICK, "--output", tmp_path / "run") == 0
    assert "2 source views instead of 8: scene 'line' has no more" in capsys.readouterr().err
    assert nvs("render", model, "--scene", scene, "--frames", "1", "--output", tmp_path / "fly") == 0
    assert "4 source views instead of 8" in capsys.readouterr().err


@needs_skimage
def test_measuring_with_fewer_views_than_sources_and_pictures_too_small(tmp_path, model, capsys):
    scene = write_scene(tmp_path / "line", count=4)
    assert nvs("eval", model, "--scene", scene, "--output", tmp_path / "views") == 0
    assert "3 source views instead of 8: scene 'line' has no more" in capsys.readouterr().err
    assert nvs("eval", model, "--scene", scene, "--shrink", "3", "--output", tmp_path / "small") == 2
    assert "at least 11 x 11 pixels, not 10 x 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scene", "{line}", "--scene", "{wide}"], "images of one size, not 32 x 24, 40 x 24"),
        (["--scene", "{line}", "--scene", "{line}"], "two scenes are called 'line'"),
        (["--scene", "{one}"], "scene 'one' has too few views to train on"),
        (["--scene", "{mirrored}"], "its pose is not rigid"),
        (["--scene", "nowhere"], "unknown scene 'nowhere'"),
        (["--scene", "{line}", "--shrink", "100"], "can be shrunk by 1 to 24, not 100"),
        (["--scene", "{line}", "--recipe", "vitalty"], "did you mean 'vitality'"),
        (["--scene", "{line}", "--steps", "0"], "must be at least 1, not 0"),
        (["--scene", "{line}", "--lr", "0"], "lr must be above 0"),
    ],
)
def test_bad_input_of_training(arguments, message, tmp_path, model, capsys):
    places = {
        "line": write_scene(tmp_path / "line"),
        "wide": write_scene(tmp_path / "wide", width=40),
        "one": write_scene(tmp_path / "one", count=2),
        "mirrored": write_scene(tmp_path / "mirrored", tilt=-1.0),
    }
    words = [word.format(**places) for word in arguments]
    assert nvs("train", model, *QUICK, "--output", tmp_path / "run", *words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_models_that_are_none(tmp_path, capsys):
    scene = write_scene(tmp_path / "line")
    rest = ["--scene", scene, "--output", tmp_path / "out"]
    assert nvs("render", "nothing", *rest) == 2
    assert "there is no trained GNT 'nothing'" in capsys.readouterr().err
    assert nvs("render", tmp_path / "gone.pth", *rest) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    vitrify.save(vitrify.create_model("vit_mini_patch2_28"), tmp_path / "vit")
    assert nvs("render", tmp_path / "vit", *rest) == 2
    assert "not a GNT" in capsys.readouterr().err
    assert nvs("train", "gnt_tiny", "--scratch", *rest) == 2
    assert "unknown GNT 'gnt_tiny'" in capsys.readouterr().err


def test_a_fly_through_goes_on_where_it_stopped(tmp_path, model, monkeypatch, capsys):
    scene, output = write_scene(tmp_path / "line"), tmp_path / "fly"
    rendered = []

    def stopping(*arguments, **options):
        if len(rendered) == 2:
            rendered.append(None)
            raise KeyboardInterrupt
        rendered.append(render(*arguments, **options))
        return rendered[-1]

    monkeypatch.setattr("vitrify.nvs.render", stopping)
    command = ["render", model, "--scene", scene, "--frames", "4", "--sources", "3", "--output", output]
    assert nvs(*command) == 130
    assert f"the same command goes on from {output}" in capsys.readouterr().err
    assert sorted(path.name for path in (output / "rgb").iterdir()) == ["000.png", "001.png"]
    assert nvs(*command) == 0
    assert len(rendered) == 5
    for index, kind in ((0, "rgb"), (3, "depth")):
        with Image.open(output / kind / f"{index:03}.png") as image:
            assert image.size == (WIDTH, HEIGHT)
    with Image.open(output / "fly-through.gif") as animation:
        assert (animation.n_frames, animation.size) == (4, (2 * WIDTH * 12, HEIGHT * 12))
    wanted = (rendered[0].rgb * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(output / "rgb" / "000.png")), wanted)


def test_pictures_of_two_models_do_not_mix(tmp_path, model, capsys):
    scene, output = write_scene(tmp_path / "line"), tmp_path / "fly"
    other = vitrify.save(create("gnt_small", **TINY), tmp_path / "other")
    rest = ["--scene", scene, "--frames", "1", "--output", output]
    assert nvs("render", model, *rest) == 0
    assert nvs("render", other, *rest) == 2
    assert "other settings: weights was" in capsys.readouterr().err


@needs_skimage
def test_held_out_views_are_measured_once(tmp_path, model, capsys, monkeypatch):
    scene, output = write_scene(tmp_path / "line"), tmp_path / "views"
    command = ["eval", model, "--scene", scene, "--sources", "3", "--output", output]
    assert nvs(*command) == 0
    first = capsys.readouterr()
    for word in ("nearest view", "mean on a plane", "model", "PSNR, dB", "SSIM"):
        assert word in first.out
    result = json.loads((output / "results.json").read_text())
    assert {record["view"] for record in result["views"]} == {"00.png", "08.png"}
    truth = Image.open(scene / "08.png")
    assert np.array_equal(np.asarray(Image.open(output / "line" / "08" / "truth.png")), np.asarray(truth))
    reason = metrics.why_no_lpips()
    assert (f"without LPIPS: {reason}" in first.err) == (reason is not None)
    monkeypatch.setattr("vitrify.nvs.evaluate.render", None)  # would fail if called
    assert nvs(*command) == 0
    assert json.loads((output / "results.json").read_text())["views"] == result["views"]


@needs_skimage
@pytest.mark.slow
def test_the_demo(tmp_path, model, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")
    converted = vitrify.load(model)
    convert_(converted, recipes.vitrify())
    vitrify.save(converted, tmp_path / "models" / "gnt-vitrify")
    model.rename(tmp_path / "models" / "gnt")
    command = ["demo", "--models", tmp_path / "models", "--sources", "3", "--output", tmp_path / "demo"]
    assert nvs(*command) == 0
    page = (tmp_path / "demo" / "report.html").read_text()
    for word in ("courtyard", "still_life", "gnt-vitrify", "mean on a plane", "Which rays and points multiply"):
        assert word in page
    assert "http" not in page.replace("http://www.w3.org", "")
    found = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert found["recipes"] == {"gnt": "none", "gnt-vitrify": "vitrify"}
    assert found["costs"]["gnt"]["shift"] == 0 < found["costs"]["gnt-vitrify"]["shift"]
    assert found["costs"]["gnt-vitrify"]["multiply"] < found["costs"]["gnt"]["multiply"]
    assert {"courtyard-000.png", "still_life-000.png", "routing-gnt-vitrify.png"} == {
        path.name for path in (tmp_path / "demo" / "figures").iterdir()
    }
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "views").rglob("*.png")}
    assert nvs(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_demo_without_models(tmp_path, capsys):
    assert nvs("demo", "--models", tmp_path, "--output", tmp_path / "demo") == 2
    assert "holds no trained GNT" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "render", "eval", "demo"])
def test_help_teaches(command, capsys):
    assert nvs(command, "--help") == 0
    assert "Example" in capsys.readouterr().out
