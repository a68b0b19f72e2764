"""What a model costs, by module group: the numbers behind `vitrify profile`.

>>> from torch import nn
>>> result = profile(nn.Sequential(nn.Linear(16, 32), nn.ReLU()), (16, 4, 16), target="h100")
>>> result.rows["*"].multiplications, result.total.parameters
(32768, 544)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from torch import nn

from vitrify.cost.energy import Energy, energy
from vitrify.cost.fusion import kernels
from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.cost.groups import group_of
from vitrify.cost.latency import Latency, latency
from vitrify.cost.workload import workload
from vitrify.nn import ShiftConv2d, ShiftLinear

PRESET = "like_for_like"


@dataclass(frozen=True)
class Costs:
    """What a group of modules costs in one forward pass.

    parameters         trained values, and codes; those that no operation reads (a reduction that was removed) included
    multiplications    products, of matrices and of elements
    additions          the accumulation of each product, whatever its primitive, and element-wise sums
    shifts             products by shifting
    others             divisions, exponentials, roots, erf, tanh, comparisons
    energy_pj          on the modelled machine of `energy`, like for like
    weight_bytes       of all weights that are read, each once, at its own width (a file rounds codes up to 4 or 8 bits)
    activation_bytes   of the tensors that one kernel leaves for another in eager mode, each once
    dram_bytes         what moves between DRAM and the chip for the products on that machine, in the tilings chosen
    latency_s          on the target of `latency`, in its own dtype
    """

    parameters: int = 0
    multiplications: int = 0
    additions: int = 0
    shifts: int = 0
    others: int = 0
    energy_pj: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    dram_bytes: float = 0.0
    latency_s: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Profile:
    """What `profile` found: a row for each module group, in the order in which they first run."""

    model: str
    input_shape: tuple[int, ...]
    rows: Mapping[str, Costs]
    energy: Energy
    latency: Latency

    @property
    def total(self) -> Costs:
        """The sum over all groups."""
        return sum(self.rows.values(), Costs())

    @property
    def unknown(self) -> Mapping[str, int]:
        """The operators that no rule knows, whose work no row holds."""
        return self.energy.unknown


def profile(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 1,
    *,
    target: str | Path = "h100",
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Return what one forward pass of the model costs, by module group.

    model, input_size, batch_size   as `workload`'s; weights are not needed
    target                          of the latency, as `latency`'s; energy is Eyeriss', like for like
    progress                        called with what is being done

    Raises InputError as `workload`, `energy` and `latency` do.
    """
    progress("tracing")
    graph = workload(model, input_size, batch_size)
    progress("tiling")
    spent = energy(graph, preset=PRESET)
    took = latency(graph, target)
    rows: dict[str, Costs] = {}
    for group, costs in (*_work(graph), *_spent(spent), *_took(took), *_moved(graph, model), *_parameters(model)):
        rows[group] = rows.get(group, Costs()) + costs
    return Profile(graph.model, graph.input_shape, rows, spent, took)


def _work(graph: Workload) -> Iterable[tuple[str, Costs]]:
    for operation in graph.operations:
        yield _group(operation), Costs(**_counts(operation))


def _counts(operation: Operation) -> dict[str, int]:
    if operation.kind != "vector":
        products = {"multiply": "multiplications", "shift": "shifts"}.get(operation.primitive)
        return {"additions": operation.macs, **({products: operation.macs} if products else {})}
    kind = {"mul": "multiplications", "add": "additions"}.get(operation.vector or "", "others")
    return {} if operation.vector == "move" else {kind: operation.elements}


def _spent(result: Energy) -> Iterable[tuple[str, Costs]]:
    per_byte = 8 * result.prices.per_bit["dram"]
    for part in result.operations:
        split = part.split
        yield group_of(part.module, part.step), Costs(energy_pj=split.total_pj, dram_bytes=split.dram / per_byte)


def _took(result: Latency) -> Iterable[tuple[str, Costs]]:
    for part in result.operations:
        yield group_of(part.module, part.step), Costs(latency_s=part.seconds)


def _moved(graph: Workload, model: nn.Module) -> Iterable[tuple[str, Costs]]:
    own = {name: parameter.numel() for name, parameter in model.named_parameters()}
    seen: set[str] = set()
    for operation in graph.operations:
        for operand in operation.inputs:
            if operand.kind == "weight" and operand.tensor not in seen:
                seen.add(operand.tensor)
                # A class token is read as often as there are images.
                elements = min(math.prod(operand.shape), own.get(operand.tensor, math.prod(operand.shape)))
                yield _group(operation), Costs(weight_bytes=elements * operand.bits / 8)
    for kernel in kernels(graph, "eager"):
        yield _group(kernel.operations[-1]), Costs(activation_bytes=sum(map(_bytes, kernel.writes)))


def _parameters(model: nn.Module) -> Iterable[tuple[str, Costs]]:
    found: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        found[group_of(name.rpartition(".")[0])] += parameter.numel()
    for name, module in model.named_modules():
        # Packed, codes are a buffer, two to a byte if narrow.
        if isinstance(module, (ShiftLinear, ShiftConv2d)) and module.packed:
            found[group_of(name)] += math.prod(module._weight_shape())
    return [(group, Costs(parameters=count)) for group, count in found.items()]


def _group(operation: Operation) -> str:
    return group_of(operation.module, operation.step)


def _bytes(operand: Operand) -> float:
    return math.prod(operand.shape) * operand.bits / 8
