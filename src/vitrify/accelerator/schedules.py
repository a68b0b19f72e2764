"""Schedules: functions that place a workload's operations on a hardware's engines.

A new accelerator is a YAML file and, if none of these suits it, a function of this form, registered by its name:

>>> @schedule("everything-on-the-first-array")
... def mine(workload, hardware, masks):
...     return [place(operation, hardware) for operation in workload.operations]
>>> _ = SCHEDULES.pop("everything-on-the-first-array")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vitrify.accelerator.hardware import Dataflow, Hardware, Lanes
from vitrify.accelerator.masks import Masks
from vitrify.accelerator.placement import Placement
from vitrify.cost.graph import Operation, Workload
from vitrify.errors import InputError

Schedule = Callable[[Workload, Hardware, Masks | None], Sequence[Placement]]
SCHEDULES: dict[str, Schedule] = {}


def schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Register a schedule under a name, for hardware descriptions and `simulate(..., schedule=name)`."""

    def register(function: Schedule) -> Schedule:
        SCHEDULES[name] = function
        return function

    return register


def depthwise_on_lanes(workload: Workload, hardware: Hardware) -> Workload:
    """Return the workload with depth-wise convolutions as vector work: a multiplication and an addition a product.

    Each channel would take one column of an array, and all of its pixels' cycles: lanes are faster by their number
    over the kernel's size. Without lanes that multiply and add, or with as large a kernel, nothing is changed.
    """
    kinds = {
        kind: engine.lanes for engine in hardware.engines.values() if isinstance(engine, Lanes) for kind in engine.does
    }
    lanes = min(kinds.get("mul", 0), kinds.get("add", 0))
    operations: list[Operation] = []
    for operation in workload.operations:
        if operation.kind != "conv" or operation.n != 1 or operation.count == 1 or operation.k >= lanes:
            operations.append(operation)
            continue
        between = replace(operation.outputs[0], tensor=f"{operation.id}.mul.out", producer=f"{operation.id}.mul")
        vector = replace(operation, kind="vector", m=0, k=0, n=0, count=1, elements=operation.macs, vector="mul")
        operations.append(replace(vector, id=f"{operation.id}.mul", outputs=(between,)))
        operations.append(replace(vector, vector="add", inputs=(between,)))
    return replace(workload, operations=tuple(operations))


def place(operation: Operation, hardware: Hardware, dataflow: Dataflow | None = None) -> Placement:
    """Place an operation on the first engine that does what it needs.

    A product goes to the array with the fewest primitives among those that have its own; one that only multiplies
    takes shifts and additions, too, if there is no better, as multiplications by powers of two and by 0 and 1. Moves
    cost nothing: the next operation reads from where the data is. Raises InputError if the hardware has no such engine.
    """
    if operation.kind == "vector":
        if operation.vector == "move":
            return Placement(operation, "")
        for name, engine in hardware.engines.items():
            if isinstance(engine, Lanes) and operation.vector in engine.does:
                return Placement(operation, name)
        raise _lacks(operation, hardware, f"engine that does {operation.vector}")
    arrays = hardware.arrays
    able = [name for name, array in arrays.items() if operation.primitive in array.primitives]
    able = sorted(able, key=lambda name: len(arrays[name].primitives))
    able += [name for name, array in arrays.items() if "multiply" in array.primitives and name not in able]
    if not able:
        raise _lacks(operation, hardware, f"array whose PEs {operation.primitive}")
    return Placement(operation, able[0], dataflow)


def _lacks(operation: Operation, hardware: Hardware, what: str) -> InputError:
    return InputError(f"hardware {hardware.name!r} has no {what}, which {operation.id} ({operation.module}) needs")


def _prefer(operation: Operation, hardware: Hardware, *names: str) -> Placement:
    """Place vector work on the first of these engines that there is and that does it, or on any other."""
    for name in names:
        engine = hardware.engines.get(name)
        if isinstance(engine, Lanes) and operation.vector in engine.does:
            return Placement(operation, name)
    return place(operation, hardware)


@schedule("systolic")
def systolic(workload: Workload, hardware: Hardware, masks: Masks | None = None) -> list[Placement]:
    """Products on the first array that has their primitive, each in its fastest dataflow; the rest on the lanes.

    Additive and shift products find arrays of their own where there are any, so experts of a mixture run side by side.
    """
    return [place(operation, hardware) for operation in workload.operations]


@schedule("vitality")
def vitality(workload: Workload, hardware: Hardware, masks: Masks | None = None) -> list[Placement]:
    """ViTALiTy's chunk-based design: the steps of Algorithm 1 each on the unit that the paper made for it.

    Steps 1 and 3: sums over tokens on the accumulators, the mean on the dividers, centring on the adders. Steps 2 and 5
    on SA-General ("general"); step 4 on SA-Diag ("diagonal") if there is one. Step 5's addition on the adders, step 6
    on the dividers. All other vector work on "special". Down-forward accumulation is what the array's `dataflows` say.
    """
    return [_vitality(operation, hardware) for operation in workload.operations]


def _vitality(operation: Operation, hardware: Hardware, flows: dict[str, Dataflow] | None = None) -> Placement:
    if operation.kind != "vector":
        if operation.step == "4" and "diagonal" in hardware.arrays:
            return Placement(operation, "diagonal")
        return place(operation, hardware, (flows or {}).get(operation.step))
    if operation.step in ("1", "2", "3", "4", "5", "6", "M", "apply"):
        summed = operation.outputs[0].shape[-2:-1] != operation.inputs[0].shape[-2:-1]
        return _prefer(operation, hardware, *(("accumulators",) if summed else ()), "adders", "dividers", "special")
    return _prefer(operation, hardware, "special")


@schedule("vitality-affine")
def vitality_affine(workload: Workload, hardware: Hardware, masks: Masks | None = None) -> list[Placement]:
    """The affine form: no denominator, so dividing by the number of tokens is multiplying by a constant."""
    return [
        _vitality(replace(o, vector="mul") if o.step in ("M", "apply") and o.vector == "div" else o, hardware)
        for o in workload.operations
    ]


@schedule("g-stationary")
def g_stationary(workload: Workload, hardware: Hardware, masks: Masks | None = None) -> list[Placement]:
    """ViTALiTy's alternative: G is accumulated in the PEs (output-stationary) and used there, head after head."""
    placements = vitality(workload, hardware, masks)
    found = []
    for placement in placements:
        operation = placement.operation
        if operation.kind == "matmul" and operation.step in ("2", "5"):
            array = hardware.arrays[placement.engine]
            if not array.in_place or not {"output", "weight"} <= set(array.dataflows):
                raise InputError(
                    f"array {placement.engine!r} of hardware {hardware.name!r} cannot keep G in place for "
                    f"{operation.id} ({operation.module}): that needs in_place: true, and output and weight among "
                    "its dataflows"
                )
            flow: Dataflow = "output" if operation.step == "2" else "weight"
            found.append(replace(placement, dataflow=flow, in_place=operation.step == "5"))
        else:
            found.append(placement)
    return found
