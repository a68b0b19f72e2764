"""`vitrify finetune`: where a run starts from, what it is measured on, and what its artefact says of the original."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

import vitrify.train
from vitrify.artefact import create_model, load, rebuild_original
from vitrify.cli import main

torch.set_num_threads(1)

MINI = "vit_mini_patch2_28"
SHIPPED = "fashion-mnist:shipped"
QUICK = ["--max-steps", "1", "--batch-size", "4", "--limit-train", "4", "--warmup-epochs", "0", "--epochs", "1"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    # The command sets it for its own process; here it must not outlive the test.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def images(folder, count=4):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("L", (28, 28), 60 * index).save(folder / f"{index}.png")


def data_set(folder, names=("a", "b", "c"), **splits):
    """Splits of labelled images, four of each class, or of unlabelled images: {split: labelled}."""
    for split, labelled in splits.items():
        for name in names if labelled else ("",):
            images(folder / split / name)
    return str(folder)


@pytest.fixture
def started(monkeypatch):
    """The arguments of every training that the command starts; none runs."""
    calls = []

    def record(model, task, config, *_, **others):
        calls.append({"model": model, "task": task, "config": config, **others})
        raise KeyboardInterrupt

    monkeypatch.setattr(vitrify.train, "finetune", record)
    return calls


def finetune(*arguments):
    return main(["finetune", *map(str, arguments)])


def test_a_new_head_follows_from_the_seed(tmp_path, started):
    data = data_set(tmp_path / "data", train=True, test=True)
    for seed, state in ((1, 0), (1, 99), (2, 99)):
        torch.manual_seed(state)  # whatever was drawn before must not matter
        given = ["--pretrained", "--num-classes", "3", "--data", data, "--seed", seed, "-o", tmp_path / "run"]
        finetune(MINI, *given)
    heads = [call["model"].head.weight for call in started]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


@pytest.mark.parametrize(
    ("given", "min_lr"),
    [([], 1e-6), (["--lr", "5e-7"], 5e-7), (["--lr", "1e-2", "--min-lr", "1e-3"], 1e-3)],
)
def test_the_last_rate_is_given_or_fits_the_first(tmp_path, started, given, min_lr):
    finetune(MINI, "--data", SHIPPED, "--log-every", "3", "-o", tmp_path / "run", *given)
    assert started[0]["config"].min_lr == min_lr
    assert started[0]["config"].log_every == 3


def test_labelled_val_images_are_taken_where_those_of_test_have_no_labels(tmp_path, started):
    data = data_set(tmp_path / "data", train=True, val=True, test=False)
    for objective, split in (("labels", "val"), ("features", "test")):
        finetune(
            MINI, "--num-classes", "3", "--data", data, "-o", tmp_path / "run", "--objective", objective, "--pretrained"
        )
        assert f"{split}: " in started[-1]["task"].eval_dataset.source


def test_unlabelled_test_images_alone(tmp_path, capsys):
    data = data_set(tmp_path / "data", train=True, test=False)
    given = [MINI, "--num-classes", "3", "--data", data, "-o", tmp_path / "run", *QUICK]
    assert finetune(*given) == 2
    message = capsys.readouterr().err
    assert "the images to evaluate on lack" in message
    assert str(tmp_path / "data" / "test") in message
    assert finetune(*given, "--objective", "distill", "--distill-alpha", "1") == 0
    assert "agreement " in capsys.readouterr().out


BLOCKED = """
import sys
sys.modules[{package!r}] = None
from vitrify.artefact import create_model, load, rebuild_original
from vitrify.cli import main
sys.exit(main({arguments!r}))
"""


def without(package, arguments):
    """Run a command in a process where `package` is not installed."""
    script = BLOCKED.format(package=package, arguments=arguments)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_eval_needs_no_accelerate():
    done = without("accelerate", ["eval", MINI, "--data", SHIPPED, "--limit", "2"])
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("accelerate", "train", ["finetune", MINI, "--data", SHIPPED]),
        ("accelerate", "train", ["demo"]),
        ("matplotlib", "report", ["demo"]),
    ],
)
def test_a_missing_extra_is_named(tmp_path, package, extra, command):
    done = without(package, [*command, "--output", str(tmp_path / "run")])
    assert done.returncode == 2, done.stderr
    assert f"needs {package}: pip install 'vitrify[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the original, after a plain model was trained ---


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory):
    """As many classes as the model has."""
    return data_set(tmp_path_factory.mktemp("ten") / "data", "abcdefghij", train=True, test=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ten_classes):
    """The run of a plain model, by the recipe that changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run = tmp_path_factory.mktemp("trained") / "run"
        assert finetune(MINI, "--pretrained", "--recipe", "softmax", "--data", ten_classes, "-o", run, *QUICK) == 0
    return run


def test_a_trained_plain_model_is_the_original_of_what_it_is_converted_to(trained, ten_classes, tmp_path):
    assert main(["convert", str(trained), "--recipe", "taylor", "-o", str(tmp_path / "linear")]) == 0
    assert finetune(tmp_path / "linear", "--data", ten_classes, "-o", tmp_path / "run", *QUICK) == 0
    original = rebuild_original(load(tmp_path / "run" / "model")._vitrify_builder)
    tuned, published = load(trained / "model"), create_model(MINI, pretrained=True)
    assert torch.equal(original.head.weight, tuned.head.weight)
    assert not torch.equal(original.head.weight, published.head.weight)


def test_a_trained_plain_model_teaches_its_own_conversion(trained, ten_classes, tmp_path, started):
    given = ["--recipe", "taylor", "--data", ten_classes, "-o", tmp_path / "run", "--objective", "distill"]
    finetune(trained, *given)
    assert torch.equal(started[0]["teacher"].head.weight, load(trained / "model").head.weight)


def test_a_trained_plain_model_has_no_original(trained, ten_classes, capsys):
    assert main(["eval", str(trained), "--data", ten_classes, "--limit", "2", "--against", "original"]) == 2
    assert "trained unconverted" in capsys.readouterr().err


def test_a_new_head_is_not_found_again(tmp_path, capsys):
    given = ["--pretrained", "--num-classes", "3", "-o", str(tmp_path / "a")]
    assert main(["convert", MINI, *given]) == 0
    data = data_set(tmp_path / "data", test=True)
    assert main(["eval", str(tmp_path / "a"), "--data", data, "--against", "original"]) == 2
    assert "new, random classifier of 3 classes" in capsys.readouterr().err
