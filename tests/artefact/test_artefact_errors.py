"""Every way in which an artefact cannot be written or read: the message names it, and nothing is left half-written."""

import errno
import json
import multiprocessing
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitrify import InputError, VitrifyError, convert_, create_model, load, recipes, save
from vitrify.artefact import atomic, folder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = create_model("vit_mini_patch2_28")
    convert_(model, recipes.vitality())
    return model


@pytest.fixture
def artefact(model, tmp_path):
    return save(model, tmp_path / "artefact")


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- writing ---


def test_below_a_regular_file(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VitrifyError, match="Not a directory"):
        save(model, tmp_path / "file" / "deep" / "artefact")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_model_converted_in_part_is_not_saved_as_unconverted(tmp_path):
    model = create_model("vit_mini_patch2_28")
    convert_(model.blocks, recipes.taylor())
    with pytest.raises(InputError, match=r"4 of its modules \(blocks\.0\.attn.*convert the whole model"):
        save(model, tmp_path / "artefact")
    convert_(model, recipes.taylor())
    save(model, tmp_path / "artefact")
    convert_(model.blocks[0], recipes.softmax())
    with pytest.raises(InputError, match=r"1 of its modules \(blocks\.0\.attn\)"):
        save(model, tmp_path / "artefact")


def test_onto_a_regular_file(model, tmp_path):
    (tmp_path / "artefact").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        save(model, tmp_path / "artefact")
    assert (tmp_path / "artefact").read_text() == "mine"


def test_read_only_folder(model, tmp_path, monkeypatch):
    """As root every folder can be written, so the system's refusal is put in place of the first write."""

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(atomic.Path, "mkdir", refuse)
    with pytest.raises(VitrifyError, match=r"cannot write .*artefact: Read-only file system; nothing was written"):
        save(model, tmp_path / "artefact")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def files_of_200_kb_at_most():
    """Python ignores SIGXFSZ, so a write beyond the limit fails in the system call, after a part of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_the_system_cuts_short(model, tmp_path, files_of_200_kb_at_most):
    """A real partial write: the weights stop after 200 kB, as on a full disk."""
    with pytest.raises(VitrifyError, match="nothing was written"):
        save(model, tmp_path / "new" / "artefact")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_artefact(model, artefact, monkeypatch):
    before = {file.name: file.read_bytes() for file in artefact.iterdir()}

    def full(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(VitrifyError, match="No space left on device; nothing was written"):
        save(model, artefact)
    assert {file.name: file.read_bytes() for file in artefact.iterdir()} == before
    assert [p.name for p in artefact.parent.iterdir()] == ["artefact"]


def test_a_failed_rename_puts_the_old_artefact_back(model, artefact, monkeypatch):
    rename = atomic.Path.rename

    def fail_once(self, target):
        if ".new-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(atomic.Path, "rename", fail_once)
    with pytest.raises(VitrifyError, match="Input/output error"):
        save(model, artefact)
    assert [p.name for p in artefact.parent.iterdir()] == ["artefact"]
    monkeypatch.undo()
    load(artefact)


def test_the_next_save_sweeps_what_a_killed_one_left(model, artefact, monkeypatch):
    neighbour = artefact.with_name(".artefact2.new-0123")
    neighbour.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        killed = multiprocessing.get_context("fork").Process(target=save, args=(model, artefact))
        killed.start()
        killed.join()
    assert len(list(artefact.parent.glob(".artefact.new-*"))) == 1
    save(model, artefact)
    assert sorted(p.name for p in artefact.parent.iterdir()) == [neighbour.name, "artefact"]


def test_a_folder_of_something_else_is_refused(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(InputError, match="not an artefact"):
        save(model, tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_an_artefact_with_someone_elses_files_is_not_replaced(model, artefact):
    (artefact / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"also holds notes\.txt"):
        save(model, artefact)
    assert (artefact / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_used(model, tmp_path):
    save(model, tmp_path)
    load(tmp_path)


def test_files_are_as_readable_as_any(artefact):
    assert {file.stat().st_mode for file in artefact.iterdir()} == {(artefact / "config.json").stat().st_mode}


# --- reading ---


def test_no_artefact(tmp_path):
    with pytest.raises(InputError, match="no artefact at"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "recipe.json", "model.safetensors"])
def test_missing_file(artefact, name):
    (artefact / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load(artefact)


@pytest.mark.parametrize("name", ["config.json", "recipe.json"])
def test_damaged_json(artefact, name):
    (artefact / name).write_text('{"format": ')
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        load(artefact)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(artefact, share):
    weights = artefact / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load(artefact)


def test_foreign_weights(artefact):
    weights = artefact / "model.safetensors"
    tensors = load_file(weights)
    foreign = {f"encoder.{name}" if "blocks" in name else name: tensor for name, tensor in tensors.items()}
    blocks = [name for name in tensors if "blocks" in name]
    save_file(foreign, weights)
    with pytest.raises(InputError) as caught:
        load(artefact)
    message = str(caught.value)
    assert f"{len(blocks)} missing keys: blocks.0." in message
    assert f"and {len(blocks) - 5} more" in message
    assert f"{len(blocks)} unexpected keys: encoder.blocks." in message


def test_weights_of_another_shape(artefact):
    weights = artefact / "model.safetensors"
    save_file({**load_file(weights), "head.bias": torch.zeros(7)}, weights)
    with pytest.raises(InputError, match=r"head\.bias has shape \(7,\), the model needs \(10,\)"):
        load(artefact)


def test_newer_format(artefact):
    edit(artefact / "config.json", format_version=99, vitrify_version="9.9")
    with pytest.raises(InputError, match=r"format 99, written by vitrify 9\.9.*upgrade"):
        load(artefact)


def test_config_of_something_else(artefact):
    (artefact / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="not of a vitrify artefact"):
        load(artefact)


def test_config_lacks_a_field(artefact):
    config = json.loads((artefact / "config.json").read_text())
    del config["builder"]
    (artefact / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lacks builder"):
        load(artefact)


def test_unknown_library(artefact):
    edit(artefact / "config.json", builder={"library": "tim"})
    with pytest.raises(InputError, match="did you mean 'timm'"):
        load(artefact)


def test_a_class_that_is_no_model_is_never_looked_up(artefact):
    pytest.importorskip("transformers")
    edit(artefact / "config.json", builder={"library": "transformers", "class": "pipeline", "config": {}})
    with pytest.raises(InputError, match="'pipeline' is not a model class"):
        load(artefact)


def test_misspelt_recipe_key(artefact):
    edit(artefact / "recipe.json", modles={})
    with pytest.raises(InputError, match="did you mean 'modules'"):
        load(artefact)


def test_given_model_converted_by_another_recipe(artefact):
    other = create_model("vit_mini_patch2_28")
    convert_(other, recipes.taylor())
    with pytest.raises(InputError, match=r"converted by 'taylor', but .* saved with recipe 'vitality'"):
        load(artefact, model=other)


def test_given_model_has_no_such_attention(artefact):
    with pytest.raises(InputError, match=r"does not fit ResNet: .*'blocks\.0\.attn'"):
        load(artefact, model=create_model("test_resnet"))


def test_given_model_may_be_converted_already(artefact, model):
    same = create_model("vit_mini_patch2_28")
    convert_(same, recipes.vitality())
    loaded = load(artefact, model=same)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
