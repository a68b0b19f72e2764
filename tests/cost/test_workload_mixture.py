"""Mixtures in a workload: each expert on its own tokens, in the split that was measured, stated, or asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitrify import InputError, Workload, workload
from vitrify.cost.graph import Operation
from vitrify.cost.serialise import check_graph
from vitrify.nn import MixtureLinear, mixture_mlp_

X = torch.zeros(2, 21, 24)


def products(graph: Workload) -> list[Operation]:
    return [op for op in graph.operations if op.kind != "vector"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x).relu())
        return out


def rows_of(graph: Workload) -> dict[str, int]:
    return {op.module: op.m for op in products(graph)}


def test_mixture_runs_each_expert_on_its_tokens():
    mlp = mixture_mlp_(Mlp(), bits=5)
    graph = workload(mlp, example_inputs=X)
    check_graph(graph)
    # alpha is 6 : 4, so the slower expert gets 40 % of the 42 tokens.
    assert rows_of(graph) == {"router": 42, "fc1": 17, "fc2": 17, "shift.fc1": 25, "shift.fc2": 25}
    assert {op.primitive for op in products(graph) if op.module.startswith("shift")} == {"shift"}
    assert {op.bits for op in products(graph) if op.primitive == "shift"} == {(32, 5, 32)}
    gathered = [op for op in graph.operations if op.vector == "move"]
    assert [op.elements for op in gathered] == [42 * 24] * 3  # to the experts, together again, and back in order
    assert graph.operations[-1].outputs[0].shape == (42, 24)


def test_mixture_with_its_measured_split():
    layer = MixtureLinear.adopt_(nn.Linear(24, 10))
    with torch.no_grad():
        layer.router.bias[0] = -1e3  # all tokens to the shift expert
        layer(X)
    graph = workload(layer, example_inputs=X)
    assert rows_of(graph) == {"router": 42, "shift": 42}
    assert workload(layer, example_inputs=X, split={"multiply": 0.5, "shift": 0.5}).count("shift") == 21 * 240


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"multiply": 1.0}, "the experts are"),
        ({"multiply": 0.7, "shift": 0.7}, "sum to 1"),
        ({"multiply": 1.5, "shift": -0.5}, "at least 0"),
    ],
)
def test_split_that_does_not_fit(split, message):
    layer = MixtureLinear.adopt_(nn.Linear(24, 10))
    with pytest.raises(InputError, match=message):
        workload(layer, example_inputs=X, split=split)
