"""An output folder that holds something else is refused, and stays as it is to the last byte."""

from __future__ import annotations

import pytest
import torch
from tiny_training import quick, tiny_vit, train
from torch import nn

from vitrify import artefact
from vitrify.errors import InputError
from vitrify.train.run_folder import fingerprint


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def an_artefact(folder):
    artefact.save(tiny_vit(), folder)


def an_artefact_called_model(folder):
    artefact.save(tiny_vit(), folder / "model")


def a_model_of_transformers(folder):
    (folder / "config.json").write_text('{"architectures": ["ViTModel"]}')


def a_damaged_config(folder):
    (folder / "config.json").write_text('{"format": "vitr')


def metrics_of_something_else(folder):
    (folder / "metrics.jsonl").write_text("{}")


def checkpoints_of_something_else(folder):
    (folder / "checkpoint" / "step-00000007").mkdir(parents=True)
    (folder / "checkpoint" / "step-00000007" / "weights").write_text("months")


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(
    "make",
    [
        an_artefact,
        an_artefact_called_model,
        a_model_of_transformers,
        a_damaged_config,
        metrics_of_something_else,
        checkpoints_of_something_else,
    ],
    ids=lambda make: make.__name__,
)
def test_what_is_not_a_run_is_refused_and_kept(tmp_path, make, resume):
    make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"is an artefact|not the folder of a run"):
        train(tiny_vit(), quick(), tmp_path, resume=resume)
    assert contents(tmp_path) == before


def test_starting_again_removes_the_runs_own_files_alone(tmp_path):
    train(tiny_vit(), quick(max_steps=2), tmp_path)
    (tmp_path / "checkpoint" / ".tmp-step-00000009").mkdir()
    (tmp_path / "checkpoint" / "step-by-step.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    train(tiny_vit(), quick(max_steps=1), tmp_path, resume="never")
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["step-00000001", "step-by-step.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_starting_again_keeps_an_artefact_beside_which_something_lies(tmp_path):
    train(tiny_vit(), quick(max_steps=1), tmp_path)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"also holds notes\.txt"):
        train(tiny_vit(), quick(max_steps=1), tmp_path, resume="never")
    assert contents(tmp_path) == before


class Mixed(nn.Module):
    """A parameter, and a buffer of every width."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        for dtype in (torch.bool, torch.bfloat16, torch.int64, torch.complex128):
            self.register_buffer(str(dtype).replace("torch.", "of_"), torch.ones(2, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))


def test_the_fingerprint_follows_every_value_and_nothing_else():
    model = Mixed()
    first = fingerprint(model)
    torch.set_num_threads(2)
    assert fingerprint(Mixed()) == first
    seen = {first}
    with torch.no_grad():
        for value in model.state_dict().values():
            value[(0,) * value.ndim] = 3 if value.dtype != torch.bool else False
            seen.add(fingerprint(model))
    assert len(seen) == 1 + len(model.state_dict())
