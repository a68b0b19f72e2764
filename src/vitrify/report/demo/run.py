"""The demo itself: load, convert, fine-tune, measure, and hand the results to `page`. On the CPU, offline."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitrify import recipes
from vitrify.artefact import create_model, input_config
from vitrify.bench import describe
from vitrify.bench.observe import attention_multiplications
from vitrify.convert import convert_
from vitrify.data import build_transform, load_dataset
from vitrify.errors import InputError, VitrifyError
from vitrify.files import write_atomically
from vitrify.report import html
from vitrify.report.capture import logit_histograms
from vitrify.report.demo import page, shiftadd
from vitrify.report.demo.pictures import attention_maps, examples, pixels
from vitrify.report.demo.results import Results, ShiftAdd
from vitrify.report.measure import Accuracy, Point, compare, predict
from vitrify.report.primitives import dispatch_maps, exponent_counts
from vitrify.train import Task, TrainConfig, finetune, make_task, read_metrics

MODEL = "vit_mini_patch2_28"
RECIPE = recipes.taylor()
"""The low-rank part alone, distilled: in `experiments/vitality` a short fine-tuning gains more that way than with the
paper's sparse part."""
TRAINING: dict[str, Any] = {
    "objective": "distill",
    "distill_features_weight": 1.0,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup_epochs": 0.1,
    "log_every": 10,
}
IMAGE_SIZES = (28, 48, 64, 96, 128)
"""Pixels; with patches of 2 these make 196, 576, 1,024, 2,304 and 4,096 tokens."""
SECONDS_PER_COMPARISON = 2.0
NAMES = ("softmax, original", "Taylor, zero-shot", "Taylor, fine-tuned")
STEPS = 7
MIXTURE_SECONDS = 0.5
"""Of the seconds for fine-tuning, so much again goes to the copy with shift layers and mixtures."""
CALIBRATION_IMAGES = 64

Say = Callable[[str], None]


def run(output: Path, *, seconds: float, data: str, seed: int, say: Say = print) -> Results:
    """Run the demo and write report.html, figures/*.png, results.json and two run folders with the artefacts.

    run/model is the one with Taylor attention, run-vitrify/model the one that also shifts and mixes.

    Args:
        output: the folder to write into; made if needed, and files of an earlier demo are replaced.
        seconds: about how long to fine-tune with Taylor attention; half as long again goes to the second copy. The
            numbers of steps follow from a short measurement.
        data: what `load_dataset` takes, with the model's ten classes.
        seed: of the fine-tuning.
        say: called with a line of rich markup before each step.

    Raises:
        InputError: `output` is a file, or the data have other classes than the model.
        VitrifyError: nothing can be written to `output`, or an attention core fails its check.
    """
    _prepare_folder(output)
    machine = describe("cpu")
    original = create_model(MODEL, pretrained=True).eval()
    convert_(original, recipes.softmax())
    test, train_data = _open(data, original)

    with _step(say, 1, f"how good the softmax model is, on {test.source}") as seconds_to_evaluate:
        answers, labels = predict(original, test)
    predictions = {NAMES[0]: answers}

    with _step(say, 2, f"converting to linear attention (recipe {RECIPE.name}), without training"):
        student = create_model(MODEL, pretrained=True).eval()
        conversion = convert_(student, RECIPE)
        predictions[NAMES[1]], _ = predict(student, test)
        say(f"      {len(conversion.changed)} of {len(conversion.changed) + len(conversion.kept)} attentions changed")
        mixed = create_model(MODEL, pretrained=True).eval()
        conversion = convert_(mixed, shiftadd.RECIPE)
        say(f"      in a copy {len(conversion.changed)} modules shift, mix or attend linearly (recipe vitrify)")
        mixed_accuracies = {"zero-shot": Accuracy.of(*predict(mixed, test))}

    base = TrainConfig(**TRAINING, seed=seed, epochs=1)
    task = make_task(base, train_data, test)
    config = _fit_budget(base, task, student, original, seconds, seconds_to_evaluate())
    with _step(say, 3, f"fine-tuning: {config.max_steps} steps, about {seconds:.0f} s") as training_seconds:
        finetune(student, task, config, output / "run", teacher=original, resume="never")
    student.eval()
    predictions[NAMES[2]], _ = predict(student, test)

    less = MIXTURE_SECONDS * seconds
    config = _fit_budget(base, task, mixed, original, less, seconds_to_evaluate())
    text = f"shift, add and mix: fine-tuning the copy, {config.max_steps} steps, about {less:.0f} s"
    with _step(say, 4, text) as mixing_seconds:
        finetune(mixed, task, config, output / "run-vitrify", teacher=original, resume="never")
    mixed.eval()
    mixed_accuracies["fine-tuned"] = Accuracy.of(*predict(mixed, test))

    example = test[0][0].unsqueeze(0)
    with _step(say, 5, "looking inside: attention maps, logits, multiplications, tokens, exponents, codes"):
        batches = [images for images, _ in DataLoader(torch.utils.data.Subset(test, range(100)), 50)]
        maps = attention_maps(original, student, batches[0][:4])
        histograms = [logit_histograms(model, batches) for model in (original, student)]
        counts = {"softmax": original, "taylor": student}
        multiplications = {name: attention_multiplications(model, example) for name, model in counts.items()}
        layers = shiftadd.mixture_layers(mixed, batches, example)
        coded = create_model(MODEL, pretrained=True).eval()
        calibration = next(iter(DataLoader(_plain(data, "train", original), CALIBRATION_IMAGES)))[0]
        mixed_accuracies["codes"], fits, bits = shiftadd.codes(coded, test, batches[0][:4], calibration)
    with _step(say, 6, f"timing softmax and Taylor, {IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]} pixels"):
        points = [_measure(size, example, say) for size in IMAGE_SIZES]
        timed = shiftadd.latencies(original, student, mixed, example, seconds=SECONDS_PER_COMPARISON)

    results = Results(
        model=f"{MODEL}, {sum(p.numel() for p in original.parameters()):,} parameters, pre-trained on Fashion-MNIST",
        recipe=f"{RECIPE.name}: {RECIPE.attention}",
        data=[test.source, train_data.source],
        machine=machine,
        accuracies={name: Accuracy.of(answer, labels) for name, answer in predictions.items()},
        training=read_metrics(output / "run" / "metrics.jsonl"),
        training_seconds=training_seconds(),
        multiplications=multiplications,
        points=points,
        histograms=histograms[0],
        tuned_histograms=histograms[1],
        examples=examples(test, predictions, labels, original, seed),
        map_images=[pixels(image, original) for image in batches[0][:4]],
        head_maps=maps[0],
        block_maps=maps[1],
        shift_add=ShiftAdd(
            recipe=shiftadd.description(),
            accuracies=mixed_accuracies,
            training_seconds=mixing_seconds(),
            latencies=timed[0],
            speedup=timed[1],
            num_images=sum(map(len, batches)),
            layers=layers,
            dispatch={name: chosen[:4] for name, chosen in dispatch_maps(mixed, batches[0]).items()},
            exponents=exponent_counts(mixed),
            code_fits=fits,
            query_bits=shiftadd.shown_bits(bits.query, "query"),
            key_bits=shiftadd.shown_bits(bits.key, "key"),
        ),
    )
    with _step(say, STEPS, "drawing the report"):
        _write(results, output)
    return results


def _prepare_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitrifyError(f"cannot make {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise VitrifyError(f"cannot write into {output}")


def _open(data: str, model: Any) -> tuple[Any, Any]:
    test = _plain(data, "test", model)
    train_data = load_dataset(
        data, "train", transform=build_transform(**input_config(model), train=True, augment="light")
    )
    names = list(model.pretrained_cfg["label_names"])
    if not test.labelled or test.classes != names:
        raise InputError(f"the demo's model knows the ten classes of Fashion-MNIST; {data!r} has {test.classes}")
    return test, train_data


def _plain(data: str, split: str, model: Any) -> Any:
    """Return the images of a split as they are, not augmented."""
    return load_dataset(data, split, transform=build_transform(**input_config(model), train=False))


@contextmanager
def _step(say: Say, number: int, text: str) -> Iterator[Callable[[], float]]:
    """Announce a step, and yield a function that tells, after it, how many seconds it took."""
    say(f"[bold]\\[{number}/{STEPS}][/bold] {text}")
    begin = time.monotonic()
    taken: list[float] = []
    yield lambda: taken[0]
    taken.append(time.monotonic() - begin)


def _fit_budget(
    config: TrainConfig, task: Task, model: nn.Module, teacher: nn.Module, seconds: float, seconds_to_evaluate: float
) -> TrainConfig:
    """Return `config` with as many steps as fit into `seconds`, judged by a few steps on a copy of the model."""
    copied = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(copied.parameters(), config.lr)
    times = []
    for batch, _ in zip(DataLoader(task.train_dataset, config.batch_size, shuffle=True), range(4), strict=False):  # type: ignore[arg-type]
        begin = time.monotonic()
        task.loss(copied, batch, teacher)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic() - begin)
    steps_per_epoch = len(task.train_dataset) // config.batch_size
    # The fastest of the few: on a busy machine a mean would leave no step to train.
    per_step = min(times) + seconds_to_evaluate / steps_per_epoch
    steps = max(int(seconds / per_step), 1)
    epochs = math.ceil(steps / steps_per_epoch)
    changes = {"epochs": epochs, "max_steps": steps, "warmup_epochs": min(config.warmup_epochs, epochs / 4)}
    return TrainConfig(**{**config.to_dict(), **changes})


def _measure(size: int, image: Tensor, say: Say) -> Point:
    """Compare softmax and Taylor at `size` pixels, on the pre-trained weights with resampled position embeddings."""
    models = []
    for recipe in (recipes.softmax(), RECIPE):
        model = create_model(MODEL, pretrained=True, img_size=size).eval()
        convert_(model, recipe)
        models.append(model)
    enlarged = F.interpolate(image, size=(size, size), mode="bilinear")
    point = compare(models[0], models[1], enlarged, seconds=SECONDS_PER_COMPARISON)
    say(f"      {point.tokens:,} tokens: core {point.core_speedup.ratio:.1f}x, model {point.model_speedup.ratio:.2f}x")
    return point


def _write(results: Results, output: Path) -> None:
    drawn = page.draw(results)
    page.write_pngs(drawn, output / "figures")
    html.write(page.report(results, drawn), output / "report.html")
    write_atomically(output / "results.json", json.dumps(results.numbers(), indent=1) + "\n")
