"""The commands from end to end, in this process: what they print, what they write, how they exit."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

import vitrify
import vitrify.train
from vitrify import recipes
from vitrify.artefact import is_artefact, load
from vitrify.cli import convert, finetune, main
from vitrify.cli.show import _span
from vitrify.convert import Recipe

torch.set_num_threads(1)

SHIPPED = "fashion-mnist:shipped"
QUICK = ["--max-steps", "2", "--batch-size", "8", "--limit-train", "16", "--warmup-epochs", "0", "--epochs", "1"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    # The command sets it for its own process; here it must not outlive the test.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "linear"
    assert main(["convert", "vit_mini_patch2_28", "--pretrained", "--output", str(folder)]) == 0
    return folder


def images(folder, count=12):
    """A flat folder of unlabelled pictures."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        pixels = torch.randint(0, 256, (28, 28), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


def labelled(folder):
    """ImageNet's layout, with as many classes as Fashion-MNIST."""
    folder.mkdir()
    for split in ("train", "test"):
        (folder / split).mkdir()
        for label in range(10):
            images(folder / split / f"class{label}", 2)
    return folder


# --- help ---


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"vitrify {vitrify.__version__}"


@pytest.mark.parametrize("command", ["convert", "finetune", "eval", "recipes", "demo"])
def test_every_command_teaches_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"vitrify {command} " in capsys.readouterr().out.partition("Example")[2]


def test_help_of_convert_names_every_recipe():
    assert all(re.search(rf"\b{name}\b", convert.EPILOG) for name in recipes.names())


def test_without_arguments_it_shows_help(capsys):
    assert main([]) == 2
    assert "finetune" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    script = "import sys; from vitrify.cli import main; main(['--help']); print({'torch', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_defaults_of_finetune_are_those_of_the_trainer():
    defaults = {name: p.default for name, p in inspect.signature(finetune.finetune).parameters.items()}
    config = vitrify.train.TrainConfig().to_dict()
    shared = (defaults.keys() & config.keys()) - {"min_lr"}  # there it follows lr
    assert len(shared) > 15
    assert {name: defaults[name] for name in shared} == {name: config[name] for name in shared}


# --- recipes ---


def test_recipes_lists_each_with_a_sentence(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert all(line.endswith(".") for line in lines)


def test_a_printed_recipe_can_be_read_back(capsys):
    assert main(["recipes", "vitality"]) == 0
    assert Recipe.from_dict(yaml.safe_load(capsys.readouterr().out)) == recipes.vitality()


# --- convert ---


def test_convert_writes_what_it_says(tmp_path, capsys):
    output = tmp_path / "a"
    assert main(["convert", "vit_mini_patch2_28", "--recipe", "taylor", "--num-classes", "3", "-o", str(output)]) == 0
    printed = capsys.readouterr()
    assert "4 changed, 0 kept, 0 refused" in printed.out
    assert "blocks.0-3.attn" in printed.out
    assert "weights are random" in printed.err
    model = load(output)
    assert model.num_classes == 3
    assert model._vitrify.recipe == recipes.taylor()


def test_convert_by_a_recipe_file_and_a_checkpoint(tmp_path, capsys):
    source = vitrify.create_model("vit_mini_patch2_28", num_classes=5)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "c.pth")
    (tmp_path / "mine.yaml").write_text("attention: taylor\nmodules:\n  blocks.0.*: softmax\n")
    given = ["--recipe", str(tmp_path / "mine.yaml"), "--checkpoint", str(tmp_path / "c.pth"), "--num-classes", "5"]
    assert main(["convert", "vit_mini_patch2_28", *given, "--output", str(tmp_path / "a")]) == 0
    model = load(tmp_path / "a")
    assert model._vitrify.recipe.name == "mine"
    assert torch.equal(model.head.weight, source.head.weight)
    assert "blocks.1-3.attn" in capsys.readouterr().out


def test_convert_of_another_size(tmp_path):
    size = ["--img-size", "32", "--in-chans", "3"]
    assert main(["convert", "vit_mini_patch2_28", "--pretrained", *size, "-o", str(tmp_path / "a")]) == 0
    assert load(tmp_path / "a")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_convert_that_would_change_nothing_writes_nothing(tmp_path, capsys):
    assert main(["convert", "test_resnet", "--output", str(tmp_path / "a")]) == 2
    assert "changed nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["blocks.0.attn"], "blocks.0.attn"),
        (["blocks.9.attn", "blocks.10.attn", "blocks.11.attn"], "blocks.9-11.attn"),
        (["blocks.0.attn", "blocks.2.attn"], "blocks.0.attn, blocks.2.attn"),
        (["s.0.b.1.attn", "s.1.b.0.attn"], "s.0.b.1.attn, s.1.b.0.attn"),
    ],
)
def test_names_that_count_up_share_a_row(names, shown):
    assert _span(names) == shown


# --- eval ---


def test_eval_against_the_original(artefact, tmp_path, capsys):
    result = tmp_path / "r.json"
    given = ["--data", SHIPPED, "--limit", "40", "--against", "original", "--json", str(result)]
    assert main(["eval", str(artefact), *given]) == 0
    printed = capsys.readouterr().out
    found = json.loads(result.read_text())
    assert found["images"] == 40
    assert found["accuracy_original"] > 70
    assert f"{found['accuracy']:.2f} %" in printed
    assert "shipped" in found["data"]
    assert 0.5 < found["agreement"]["token_cosine_mean"] < 1
    assert 0 < found["agreement"]["knn_overlap"] < 1


def test_eval_of_the_identity_agrees_entirely(tmp_path):
    """Proves the comparison itself: the softmax recipe must come out equal to the original."""
    folder, result = tmp_path / "same", tmp_path / "r.json"
    assert main(["convert", "vit_mini_patch2_28", "--pretrained", "--recipe", "softmax", "-o", str(folder)]) == 0
    given = ["--data", SHIPPED, "--limit", "20", "--against", "original", "--json", str(result)]
    assert main(["eval", str(folder), *given]) == 0
    found = json.loads(result.read_text())
    assert found["accuracy"] == found["accuracy_original"]
    assert found["agreement"]["token_cosine_min"] > 1 - 1e-5
    assert found["agreement"]["knn_overlap"] == 1


def test_eval_of_unlabelled_images_against_a_checkpoint(artefact, tmp_path, capsys):
    original = vitrify.create_model("vit_mini_patch2_28", pretrained=True)
    torch.save(original.state_dict(), tmp_path / "o.pth")
    photos = images(tmp_path / "photos")
    assert main(["eval", str(artefact), "--data", str(photos), "--against", str(tmp_path / "o.pth")]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" not in printed
    assert "kNN" in printed


@pytest.mark.filterwarnings("ignore:the checkpoint has no classifier")
def test_a_checkpoint_without_answers_is_nothing_to_compare_with(artefact, tmp_path, capsys):
    """Its head would be a random one. For features alone it will do."""
    encoder = vitrify.create_model("vit_mini_patch2_28", pretrained=True, num_classes=0)
    torch.save(encoder.state_dict(), tmp_path / "e.pth")
    given = ["eval", str(artefact), "--data", SHIPPED, "--limit", "4", "--against", str(tmp_path / "e.pth")]
    assert main(given) == 2
    assert "e.pth has no classifier of this model's classes" in capsys.readouterr().err
    _, teacher = finetune.load_pair(str(artefact), str(tmp_path / "e.pth"), {}, needs_head=False)
    assert torch.equal(teacher.pos_embed, encoder.pos_embed)


# --- finetune ---


def test_finetune_an_artefact_then_eval_its_run(artefact, tmp_path, capsys):
    run, data = tmp_path / "run", labelled(tmp_path / "data")
    given = ["finetune", str(artefact), "--data", str(data), "--output", str(run), "--objective", "distill", *QUICK]
    assert main(given) == 0
    assert is_artefact(run / "model")
    assert "top1" in capsys.readouterr().out
    tuned, before = load(run / "model"), load(artefact)
    assert tuned._vitrify.recipe == before._vitrify.recipe
    assert not torch.equal(tuned.head.weight, before.head.weight)
    assert main(["eval", str(run), "--data", str(data), "--against", "original"]) == 0
    assert "complete" in repeat(given, capsys)


def repeat(given, capsys):
    capsys.readouterr()
    assert main(given) == 0
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_finetune_by_features_needs_no_labels(tmp_path):
    photos, run = images(tmp_path / "photos"), tmp_path / "run"
    given = ["--data", str(photos), "--objective", "features", "--pretrained", "--num-classes", "0", "-o", str(run)]
    assert main(["finetune", "vit_mini_patch2_28", *given, *QUICK, "--batch-size", "4"]) == 0
    assert load(run / "model")._vitrify.recipe == recipes.vitality()


def test_interrupted_finetune_says_how_to_go_on(artefact, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("stopped at step 7")

    monkeypatch.setattr(vitrify.train, "finetune", interrupted)
    assert main(["finetune", str(artefact), "--data", SHIPPED, "--output", str(tmp_path / "run")]) == 130
    message = capsys.readouterr().err
    assert "stopped at step 7" in message
    assert f"the same command resumes from {tmp_path / 'run'}" in message


@pytest.mark.slow
def test_ctrl_c_for_real(artefact, tmp_path):
    run, data = tmp_path / "run", labelled(tmp_path / "data")
    command = [sys.executable, "-m", "vitrify", "finetune", str(artefact), "--data", str(data), "--output", str(run)]
    command += ["--epochs", "12", "--batch-size", "4", "--checkpoint-every-s", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            while process.poll() is None and not list(run.glob("checkpoint/step-*")):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, message
    assert "the same command resumes" in message
    assert "Traceback" not in message
    assert not is_artefact(run / "model")
    subprocess.run(command, check=True, capture_output=True)
    assert is_artefact(run / "model")
