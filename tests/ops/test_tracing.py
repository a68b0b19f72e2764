"""What every op asks about the graph being recorded, and about autocast."""

import pytest
import torch
from torch.fx import symbolic_trace

from vitrify.nn import LearnedThreshold
from vitrify.ops.autocast import under_autocast, without_autocast
from vitrify.ops.tracing import exporting

torch.set_num_threads(1)


class Asks(torch.nn.Module):
    """Adds 1 to its input if `exporting`, else 2, and keeps the answer."""

    answer: bool | None = None

    def forward(self, x):
        self.answer = exporting(x)
        return x + (1 if self.answer else 2)


def export(model, x):
    torch.export.export(model, (x,))


def compiled(model, x):
    torch.compile(model, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        (lambda model, x: model(x), False),
        (compiled, False),
        (export, True),
        (lambda model, x: torch.jit.trace(model, x, check_trace=False), True),
        (lambda model, _: symbolic_trace(model), True),
    ],
    ids=["eager", "compile", "export", "jit", "fx"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_graph_to_keep_is_told_from_one_to_run(record, answer):
    model = Asks()
    record(model, torch.zeros(2))
    assert model.answer is answer


def test_strict_export_keeps_its_graph_too():
    """Its tracer is that of torch.compile."""
    program = torch.export.export(Asks(), (torch.zeros(2),), strict=True)
    assert program.module()(torch.zeros(2)).tolist() == [1, 1]


def test_binarisers_ask_for_onnx_too(monkeypatch):
    """Their straight-through gradient is for training alone."""
    binariser, x = LearnedThreshold(1, 2), torch.zeros(1, 1, 3, 2, requires_grad=True)
    assert binariser(x).requires_grad
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not binariser(x).requires_grad


def test_autocast_is_seen_and_left():
    x = torch.ones(2, 2)
    assert not under_autocast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert under_autocast(x)
        assert not under_autocast(x.to("meta"))
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert not under_autocast(x)
            assert (x @ x).dtype == torch.float32
