from __future__ import annotations

import multiprocessing
import resource
import signal

import pytest
import torch

from vitrify.errors import InputError, VitrifyError
from vitrify.train import checkpoint as checkpoints
from vitrify.train.checkpoint import Checkpoint


def example(step: int, size: int = 3) -> Checkpoint:
    tensors = {"model": {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}, "optimizer": {}}
    return Checkpoint(step, tensors, {"note": 0.1})


def test_round_trip_keeps_only_the_newest_and_no_pickle(tmp_path):
    for step in (5, 10, 100):
        checkpoints.save(tmp_path, example(step))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".safetensors", ".json"}
    loaded = checkpoints.load_latest(tmp_path)
    assert loaded.step == 100
    assert loaded.state["note"] == 0.1
    assert torch.equal(loaded.tensors["model"]["a"], torch.full((3,), 100.0))
    assert loaded.tensors["model"]["b"].dtype == torch.int64
    assert loaded.tensors["optimizer"] == {}


def test_shared_and_strided_tensors_are_stored_with_their_values(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    checkpoints.save(tmp_path, Checkpoint(1, {"model": {"x": base, "tied": base, "t": base.T}}, {}))
    loaded = checkpoints.load_latest(tmp_path).tensors["model"]
    assert torch.equal(loaded["x"], base)
    assert torch.equal(loaded["tied"], base)
    assert torch.equal(loaded["t"], base.T)


def test_what_a_kill_leaves_behind_is_ignored_and_cleared(tmp_path):
    checkpoints.save(tmp_path, example(3))
    leftover = tmp_path / ".tmp-step-00000004"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoints.load_latest(tmp_path).step == 3
    assert not leftover.exists()
    # Killed after the rename, before the old one was removed: the newer counts.
    (tmp_path / "step-00000003").rename(tmp_path / "kept")
    checkpoints.save(tmp_path, example(4))
    (tmp_path / "kept").rename(tmp_path / "step-00000003")
    assert checkpoints.load_latest(tmp_path).step == 4


def test_nothing_there(tmp_path):
    assert checkpoints.load_latest(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["truncated tensors", "truncated state", "missing file", "foreign", "newer"])
def test_damage_is_an_error_that_names_the_checkpoint(tmp_path, damage):
    folder = checkpoints.save(tmp_path, example(7, size=100))
    tensors, state = folder / "model.safetensors", folder / "state.json"
    if damage == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-50])
    elif damage == "truncated state":
        state.write_text(state.read_text()[:-20])
    elif damage == "missing file":
        tensors.unlink()
    elif damage == "foreign":
        state.write_text("[1]")
    else:
        state.write_text(state.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(InputError, match="step-00000007"):
        checkpoints.load_latest(tmp_path)


def test_foreign_keys_and_shapes_are_listed():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    checkpoints.check_keys("model", expected, dict(expected))
    with pytest.raises(InputError, match=r"1 missing key: b; 1 unexpected key: c; 1 wrong shape: a has shape \(4,\)"):
        checkpoints.check_keys("model", expected, {"a": torch.zeros(4), "c": torch.zeros(1)})


def save_where_files_cannot_grow(folder, connection):
    # A full disk, made with a limit on file size: writes fail half-way through.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        checkpoints.save(folder, example(9, size=100_000))
        connection.send("no error")
    except VitrifyError as error:
        connection.send(str(error))


def test_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    checkpoints.save(tmp_path, example(8))
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=save_where_files_cannot_grow, args=(tmp_path, send))
    process.start()
    assert receive.poll(30)
    message = receive.recv()
    process.join()
    assert "could not write a checkpoint" in message
    assert str(tmp_path) in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]
    assert checkpoints.load_latest(tmp_path).step == 8
