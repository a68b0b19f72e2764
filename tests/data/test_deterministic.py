import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from vitrify.data import DeterministicDataset, load_dataset


class Draws(Dataset):
    """Item i is one number of each generator."""

    classes = ("a", "b")

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def epoch_of(data, **loader):
    return torch.cat(list(DataLoader(data, batch_size=5, **loader)))


def test_items_depend_on_seed_epoch_and_index_only():
    data = DeterministicDataset(Draws(), seed=3)
    first = epoch_of(data)
    assert torch.equal(torch.stack([data[i] for i in reversed(range(12))]).flip(0), first)
    assert torch.equal(epoch_of(data, num_workers=2), first)
    assert torch.equal(epoch_of(Subset(data, range(4, 8))), first[4:8])
    data.set_epoch(1)
    second = epoch_of(data)
    other_seed = epoch_of(DeterministicDataset(Draws(), seed=4))
    numbers = torch.cat([first, second, other_seed])
    for column in range(3):  # no two streams begin alike, in any of the generators
        assert numbers[:, column].unique().numel() == 36


def test_set_epoch_reaches_persistent_workers():
    data = DeterministicDataset(Draws(), seed=0)
    loader = DataLoader(data, batch_size=5, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        assert torch.equal(torch.cat(list(loader)), torch.stack([data[i] for i in range(12)]))


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_generators_are_left_alone(fails):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    class Failing(Draws):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise RuntimeError("damaged")

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    if fails:
        with pytest.raises(RuntimeError, match="damaged"):
            DeterministicDataset(Failing(), seed=0)[1]
    else:
        DeterministicDataset(Draws(), seed=0)[1]
    assert draw() == expected


def test_attributes_of_the_data_show_through():
    data = DeterministicDataset(load_dataset("fashion-mnist:shipped", "test"), seed=0)
    assert data.classes[9] == "Ankle boot"
    assert "shipped" in data.source
    with pytest.raises(AttributeError, match="colour"):
        _ = data.colour
