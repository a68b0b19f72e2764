"""Schedules of the sparse-attention accelerators: softmax attention whose masks say what is computed.

Both take the masks that were captured from a model, or synthetic ones (then the result says so). What they charge that
the public simulators leave out, and what those charge differently, is in README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vitrify.accelerator.hardware import Hardware, Systolic
from vitrify.accelerator.masks import Masks
from vitrify.accelerator.packing import Mask, packed_rounds, polarise
from vitrify.accelerator.placement import Placement, array_of
from vitrify.accelerator.schedules import place, schedule
from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.errors import InputError

DENSITIES = {"sanger": 0.25, "vitcod": 0.1}
"""Of the synthetic masks: Sanger keeps 0.08 to 0.27 without loss of accuracy, ViTCoD a tenth."""
_PREDICTOR_BITS = 4

Passes = Callable[[Mask, Systolic, int], int]
"""Cycles of one product over a head's masks (images, queries, keys), on an array, for a head of some width."""


@schedule("sanger")
def sanger(workload: Workload, hardware: Hardware, masks: Masks | None) -> list[Placement]:
    """Sanger (MICRO 2021): 4-bit scores predict a mask, whose entries are packed onto the array, row by row.

    All scores are computed from 4-bit operands on the array "predictor", and each is compared with a threshold. Q K^T
    and A V take as many cycles as a head is wide for each pass over the packed mask; softmax works on what is kept.
    """
    placements = []
    for placement in _over_masks(workload, hardware, masks, _packed):
        operation = placement.operation
        if operation.step == "qk" and operation.kind == "matmul" and placement.cycles:
            scores, threshold, kept = _prediction(operation)
            if "predictor" not in hardware.arrays:
                raise InputError(f"hardware {hardware.name!r} has no array 'predictor', which {operation.module} needs")
            placements += [Placement(scores, "predictor"), place(threshold, hardware)]
            placements.append(replace(placement, operation=replace(operation, inputs=(*operation.inputs, kept))))
        else:
            placements.append(placement)
    return placements


@schedule("vitcod")
def vitcod(workload: Workload, hardware: Hardware, masks: Masks | None) -> list[Placement]:
    """ViTCoD (HPCA 2023): masks that do not depend on the image; full columns for global tokens, the rest sparse.

    Its two engines share the PEs in proportion to their work, without loss: a favour to it. The auto-encoder that
    halves the traffic of Q and K is left out.
    """
    return _over_masks(workload, hardware, masks, _polarised)


def _packed(mask: Mask, array: Systolic, head_width: int) -> int:
    return packed_rounds(mask, array.rows, array.columns) * head_width


def _polarised(mask: Mask, array: Systolic, head_width: int) -> int:
    split = polarise(mask)
    return -(-int((split.denser + split.sparser).sum()) * head_width // array.pes)


def _over_masks(workload: Workload, hardware: Hardware, masks: Masks | None, passes: Passes) -> list[Placement]:
    """Place everything; of softmax attention, do what the masks keep, in the mean over their images."""
    placements = []
    for operation in workload.operations:
        placement = place(operation, hardware)
        if masks is not None and operation.step in ("qk", "softmax", "av") and placement.engine:
            heads = masks[operation.module].kept.swapaxes(0, 1)
            of_scores = any(operand.shape[-2:] == heads.shape[-2:] for operand in operation.inputs)
            if operation.kind == "matmul":
                width = operation.k if operation.step == "qk" else operation.n
                array = array_of(placement, hardware)
                placement = replace(placement, cycles=[-(-passes(head, array, width) // len(head)) for head in heads])
            if operation.kind == "matmul" or of_scores:
                placement = replace(placement, kept=[float(head.mean()) for head in heads])
        placements.append(placement)
    return placements


def _prediction(scores: Operation) -> tuple[Operation, Operation, Operand]:
    """Return the predictor's product, its comparison with the threshold, and the mask that comes out."""
    identity = scores.id.partition(".")[0] + ".predict"
    shape = scores.outputs[0].shape
    low = Operand(f"{identity}.out", shape, 8, "activation", identity)
    kept = Operand(f"{identity}.mask", shape, 1, "activation", f"{identity}.mask")
    operands = tuple(replace(operand, bits=_PREDICTOR_BITS) for operand in scores.inputs[:2])
    bits = (_PREDICTOR_BITS, _PREDICTOR_BITS, 16)
    product = replace(scores, id=identity, step="predict", inputs=operands, outputs=(low,), bits=bits)
    threshold = Operation(
        f"{identity}.mask",
        scores.module,
        "vector",
        (low,),
        (kept,),
        "predict",
        vector="compare",
        elements=math.prod(shape),
    )
    return product, threshold, kept
