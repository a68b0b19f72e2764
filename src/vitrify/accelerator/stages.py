"""Attention as a pipeline: which of its operations go through head by head, and how far each runs behind the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vitrify.accelerator.placement import Placement, base, grouping, kernel, sums

CHUNK = 128
"""Tokens in a chunk; there are at most MOST_CHUNKS chunks of a head."""
MOST_CHUNKS = 16

Mode = Literal["rows", "sum", "whole"]


@dataclass(frozen=True)
class Stage:
    """One placement in a run of attention's operations.

    mode      "rows": a chunk of the output for a chunk of the rows; "sum": chunks are added up, and the output is there
              after the last (sums over tokens, K^T V); "whole": too small to cut, once per group
    lag       units (chunks of heads, one after another) by which it runs behind the first stage
    groups, chunks   how many units there are
    """

    index: int
    mode: Mode
    lag: int
    groups: int
    chunks: int
    outputs: tuple[str, ...]
    last_lag: int | None = None


def runs(placements: Sequence[Placement], readers: Mapping[str, Sequence[int]], pipeline: bool) -> list[list[Stage]]:
    """Return what is lowered together: attention's operations with the same groups; the vector work of a kernel, and
    of kernels that go on with it one by one.

    Every other operation stands alone, as a stage without outputs. readers: the placements that read each tensor.
    Without the pipeline no stage runs ahead for the sake of another.
    """
    found: list[list[Stage]] = []
    run: list[int] = []
    for index, placement in enumerate(placements):
        inside = bool(placement.engine) and (bool(placement.operation.step) or _between_activations(placement))
        if run and (not inside or _groups(placement) != _groups(placements[run[0]])):
            found.append(_stages(placements, run, readers, pipeline))
            run = []
        if inside:
            run.append(index)
            continue
        alone = Stage(index, "rows", 0, 1, 1, ())
        if found and not found[-1][0].outputs and _goes_on(placements[found[-1][-1].index], placement):
            found[-1].append(alone)
        else:
            found.append([alone])
    if run:
        found.append(_stages(placements, run, readers, pipeline))
    return found


def in_run_bits(all_runs: Sequence[Sequence[Stage]]) -> dict[str, float]:
    """Return for tensors that live inside a run only the share of them that exists at any time."""
    found: dict[str, float] = {}
    for run in all_runs:
        for stage in run:
            if stage.last_lag is not None:
                units = stage.groups * stage.chunks
                for output in stage.outputs:
                    found[output] = min(1.0, (stage.last_lag - stage.lag + 2) / units)
    return found


def _goes_on(one: Placement, other: Placement) -> bool:
    """Say whether vector work is of the same kernel as the one before, or takes over its results one by one."""
    if not all(p.operation.kind == "vector" and p.engine for p in (one, other)):
        return False
    if kernel(one.operation) == kernel(other.operation):
        return True
    made = {output.tensor for output in one.operation.outputs}
    follows = any(operand.tensor in made for operand in other.operation.inputs)
    return follows and not sums(one.operation) and not sums(other.operation)


def _groups(placement: Placement) -> int:
    return grouping(placement.operation)[0]


def _stages(
    placements: Sequence[Placement], run: Sequence[int], readers: Mapping[str, Sequence[int]], pipeline: bool
) -> list[Stage]:
    groups = _groups(placements[run[0]])
    tokens = max(max(grouping(placements[i].operation)[1], _inner(placements[i])) for i in run)
    chunks = min(-(-tokens // CHUNK), MOST_CHUNKS)
    made: dict[str, Stage] = {}
    stages: list[Stage] = []
    array_after: dict[str, bool] = {}
    for index in run:
        placement = placements[index]
        operation = placement.operation
        inputs = [made[base(o.tensor)] for o in operation.inputs if base(o.tensor) in made]
        mode = _mode(placement, inputs)
        lag = 0
        for operand in operation.inputs:
            source = made.get(base(operand.tensor))
            if source is None:
                continue
            behind = source.lag
            if source.mode == "sum" or (mode != "whole" and _reads_whole(placement, operand.tensor)):
                behind += chunks - 1 if source.mode != "whole" else 0
            # An array whose operand a vector engine makes would idle until it is there: it does another unit first.
            if operation.kind == "matmul" and array_after[base(operand.tensor)] and pipeline:
                behind += 1
            lag = max(lag, behind)
        names = tuple(output.tensor for output in operation.outputs)
        stage = Stage(index, mode, lag, groups, chunks, names)
        stages.append(stage)
        for name in names:
            made[name] = stage
            array_after[name] = operation.kind == "vector"
    return _with_ends(stages, readers)


def _with_ends(stages: list[Stage], readers: Mapping[str, Sequence[int]]) -> list[Stage]:
    """Note the lag of the last stage that reads what a stage makes, unless something outside of the run reads it."""
    lag_of = {stage.index: stage.lag for stage in stages}
    ended = []
    for stage in stages:
        lags = [lag_of.get(index, -1) for output in stage.outputs for index in readers.get(output, ())]
        ended.append(replace(stage, last_lag=max(lags)) if lags and min(lags) >= 0 else stage)
    return ended


def _between_activations(placement: Placement) -> bool:
    operation = placement.operation
    return operation.kind == "matmul" and all(operand.kind == "activation" for operand in operation.inputs[:2])


def _inner(placement: Placement) -> int:
    return placement.operation.k if sums_over_tokens(placement) else 0


def sums_over_tokens(placement: Placement) -> bool:
    """Say whether a product's inner dimension is the tokens (K^T V), so that chunks of it add up."""
    operation = placement.operation
    return operation.kind == "matmul" and operation.step in ("M", "2")


def _mode(placement: Placement, inputs: Sequence[Stage]) -> Mode:
    operation = placement.operation
    if sums_over_tokens(placement):
        return "sum"
    if operation.kind == "matmul":
        return "rows"
    rows = [o.shape[-2] for o in operation.inputs if o.kind == "activation" and len(o.shape) > 1]
    out = operation.outputs[0].shape[-2] if len(operation.outputs[0].shape) > 1 else 1
    if (
        inputs
        and all(stage.mode in ("sum", "whole") for stage in inputs)
        and len(inputs) == sum(o.kind == "activation" for o in operation.inputs)
    ):
        return "whole"
    return "sum" if out < max(rows, default=out) else "rows"


def _reads_whole(placement: Placement, tensor: str) -> bool:
    """Say whether each chunk of a placement reads all of a tensor of its group: a product's right operand."""
    operation = placement.operation
    return (
        operation.kind == "matmul"
        and not sums_over_tokens(placement)
        and len(operation.inputs) > 1
        and operation.inputs[1].tensor == tensor
    )
