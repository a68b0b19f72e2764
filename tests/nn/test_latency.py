"""Latencies are of the deployed experts, set alpha, and are refused where they were not measured."""

import copy
import dataclasses
import json
import time

import pytest
import torch
from torch import nn

from vitrify.errors import InputError
from vitrify.nn import LatencyRecord, MixtureLinear, apply_latencies_, measure_latencies_
from vitrify.nn import latency as latency_module


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = MixtureLinear.adopt_(nn.Linear(8, 6))
        self.second = MixtureLinear.adopt_(nn.Linear(6, 4))

    def forward(self, x, *, scale=1.0):
        return self.second(self.first(x * scale).relu())


def test_the_record_says_what_was_measured_and_sets_alpha():
    model, x = Model(), torch.randn(2, 5, 8)
    record = measure_latencies_(model, x, repeats=3)
    assert record.threads == torch.get_num_threads()
    assert record.dtype == "float32"
    assert record.device == latency_module.device_name(torch.device("cpu")) != ""
    assert {name: entry.shape for name, entry in record.modules.items()} == {"first": (10, 8), "second": (10, 6)}
    assert record.modules["second"].layers == ((4, 6),)
    for name, entry in record.modules.items():
        assert list(entry.seconds) == ["multiply", "shift"]
        assert model.get_submodule(name).alpha == tuple(entry.seconds.values())
        assert all(0 < value < 1 for value in entry.seconds.values())


def test_a_slower_expert_is_found_slower(monkeypatch):
    model, packed = Model(), []
    forward = type(model.first.shift).forward

    def slow(self, input):
        packed.append(self.packed)
        time.sleep(0.002)
        return forward(self, input)

    model(torch.randn(3, 8))
    monkeypatch.setattr(type(model.first.shift), "forward", slow)
    record = measure_latencies_(model, {"x": torch.randn(3, 8), "scale": torch.tensor(2.0)}, repeats=3)
    for entry in record.modules.values():
        assert entry.seconds["shift"] > 0.002 > entry.seconds["multiply"]
    # The model's own forward ran unpacked, once; everything timed was packed, and only in a copy.
    assert packed[:2] == [False, False]
    assert all(packed[2:])
    assert not model.first.shift.packed


def test_modes_and_hooks_are_left_as_they_were():
    model, x = Model(), torch.randn(3, 8)
    model.second.eval()
    modes = [module.training for module in model.modules()]
    measure_latencies_(model, x, repeats=1)
    assert [module.training for module in model.modules()] == modes
    assert not model.first._forward_pre_hooks
    with torch.autocast("cpu", torch.bfloat16):
        assert measure_latencies_(model, x, repeats=1).dtype == "bfloat16"


def test_a_record_travels_through_json_and_applies():
    model, other = Model(), Model()
    record = measure_latencies_(model, torch.randn(2, 5, 8), repeats=1)
    read = LatencyRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert read == record
    apply_latencies_(other, read)
    assert other.first.alpha == model.first.alpha != (6.0, 4.0)
    assert other.second.alpha == model.second.alpha


def test_a_record_of_another_device_shape_or_model_is_refused():
    model = Model()
    record = measure_latencies_(model, torch.randn(2, 8), repeats=1)
    entry = record.modules["second"]

    def second(**changes):
        return {**record.modules, "second": dataclasses.replace(entry, **changes)}

    for changes, message in (
        ({"device": "another"}, "measured on another, the model is on"),
        ({"modules": {"first": entry}}, "second is in one of both only"),
        ({"modules": second(layers=((4, 5),))}, r"second: .* layers \(out, in\) \(\(4, 5\),\), not \(\(4, 6\),\)"),
        ({"modules": second(seconds={"multiply": 1.0})}, "second: the latencies are of experts"),
    ):
        fresh = copy.deepcopy(Model())
        with pytest.raises(InputError, match=message + ".*: measure again"):
            apply_latencies_(fresh, dataclasses.replace(record, **changes))
        assert fresh.first.alpha == fresh.second.alpha == (6.0, 4.0)
    with pytest.raises(InputError, match=r"not a latency record \(KeyError: 'modules'\)"):
        LatencyRecord.from_dict({})


def test_a_record_of_another_number_of_tokens_is_refused_if_there_is_an_example():
    model = Model()
    record = measure_latencies_(model, torch.randn(2, 8), repeats=1)
    fresh = Model()
    with pytest.raises(
        InputError, match=r"first: the latencies are of tokens .* \(2, 8\), not \(3, 8\): measure again"
    ):
        apply_latencies_(fresh, record, torch.randn(3, 8))
    assert fresh.first.alpha == (6.0, 4.0)
    apply_latencies_(fresh, record, torch.randn(2, 8))
    assert fresh.first.alpha == model.first.alpha


def test_what_cannot_be_measured_is_named():
    with pytest.raises(InputError, match="no mixture"):
        measure_latencies_(nn.Linear(3, 3), torch.randn(3))
    model = Model()
    model.spare = MixtureLinear.adopt_(nn.Linear(3, 3))
    with pytest.raises(InputError, match="spare got no tokens"):
        measure_latencies_(model, torch.randn(3, 8), repeats=1)
    with pytest.raises(InputError, match="repeats must be at least 1"):
        measure_latencies_(Model(), torch.randn(3, 8), repeats=0)
