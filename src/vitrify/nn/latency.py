"""The calibration record of a mixture's experts: how long each takes on this device, at this shape."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.nn.copying import copy_without_hooks
from vitrify.nn.mixture import Mixture
from vitrify.nn.modes import evaluating

MEASURE_AGAIN = "measure again with measure_latencies_"


@dataclass(frozen=True)
class ExpertLatencies:
    """One mixture: shape of its tokens (T, C), (out, in) of its linear layers, seconds by expert on all T tokens."""

    shape: tuple[int, int]
    layers: tuple[tuple[int, int], ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class LatencyRecord:
    """What `measure_latencies_` measured. It belongs to a machine and a model's shapes, not to a recipe.

    device: the CPU's or GPU's own name. dtype: of the experts' results, for instance "bfloat16" under autocast.
    threads: torch's intra-op threads. modules: by the mixture's qualified name.
    """

    device: str
    dtype: str
    threads: int
    modules: dict[str, ExpertLatencies]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyRecord:
        """Read what `to_dict` wrote, also after a trip through JSON; raises InputError for anything else."""
        try:
            modules = {
                str(name): ExpertLatencies(
                    shape=(int(entry["shape"][0]), int(entry["shape"][1])),
                    layers=tuple((int(rows), int(columns)) for rows, columns in entry["layers"]),
                    seconds={str(expert): float(value) for expert, value in entry["seconds"].items()},
                )
                for name, entry in values["modules"].items()
            }
            return cls(str(values["device"]), str(values["dtype"]), int(values["threads"]), modules)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"not a latency record ({type(error).__name__}: {error}): {MEASURE_AGAIN}") from error


@torch.no_grad()
def measure_latencies_(
    model: nn.Module, example_input: Tensor | Mapping[str, Tensor], *, repeats: int = 30
) -> LatencyRecord:
    """Time every expert of every mixture in `model`, and set each mixture's `alpha` to what was found.

    The model runs once on `example_input` (a tensor, or keyword arguments) in eval mode; then each expert runs alone on
    all tokens that its mixture got, as deployed: its shift layers packed (but "int8" as it is, in floats). Call it
    under the autocast, on the device and with the batch size of the deployment. Experts take turns, and the median of
    `repeats` calls counts.

    Raises InputError if the model has no mixture, or one that the input does not reach.
    """
    mixtures = _mixtures(model)
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, not {repeats}")
    tokens = _tokens(model, mixtures, example_input)
    found: dict[str, ExpertLatencies] = {}
    dtype = ""
    for name, mixture in mixtures.items():
        x = tokens[name]
        deployed = copy_without_hooks(mixture).eval()
        deployed.pack_()
        experts = deployed.experts()
        dtype = str(experts[deployed.expert_names[0]](x).dtype).removeprefix("torch.")
        seconds = _time(experts, x, repeats)
        found[name] = ExpertLatencies((x.shape[0], x.shape[1]), _layers(mixture), seconds)
    for name, mixture in mixtures.items():
        mixture.set_alpha(tuple(found[name].seconds.values()))
    device = next(iter(tokens.values())).device
    return LatencyRecord(device_name(device), dtype, torch.get_num_threads(), found)


@torch.no_grad()
def apply_latencies_(
    model: nn.Module, record: LatencyRecord, example_input: Tensor | Mapping[str, Tensor] | None = None
) -> None:
    """Set the `alpha` of every mixture in `model` from a record, which must be of this device and these shapes.

    With an `example_input`, as for `measure_latencies_`, the model runs once on it and the numbers of tokens are
    compared as well: what a batch of other size costs is another question.
    Raises InputError, and changes nothing, if the device, the mixtures' names, their experts, layers or tokens differ.
    """
    mixtures = _mixtures(model)
    here = device_name(next(iter(mixtures.values())).router.weight.device)
    if record.device != here:
        raise InputError(f"the latencies were measured on {record.device}, the model is on {here}: {MEASURE_AGAIN}")
    if set(record.modules) != set(mixtures):
        odd = sorted(set(record.modules) ^ set(mixtures))
        raise InputError(f"the latencies belong to other mixtures ({odd[0]} is in one of both only): {MEASURE_AGAIN}")
    for name, mixture in mixtures.items():
        entry = record.modules[name]
        if set(entry.seconds) != set(mixture.expert_names):
            experts = f"{tuple(entry.seconds)}, not {mixture.expert_names}"
            raise InputError(f"{name}: the latencies are of experts {experts}: {MEASURE_AGAIN}")
        if entry.layers != _layers(mixture):
            layers = f"{entry.layers}, not {_layers(mixture)}"
            raise InputError(f"{name}: the latencies are of layers (out, in) {layers}: {MEASURE_AGAIN}")
    tokens = {} if example_input is None else _tokens(model, mixtures, example_input)
    for name, x in tokens.items():
        if tuple(x.shape) != record.modules[name].shape:
            shapes = f"{record.modules[name].shape}, not {tuple(x.shape)}"
            raise InputError(f"{name}: the latencies are of tokens (number, width) {shapes}: {MEASURE_AGAIN}")
    for name, mixture in mixtures.items():
        mixture.set_alpha([record.modules[name].seconds[expert] for expert in mixture.expert_names])


def device_name(device: torch.device) -> str:
    """Return the name of the processor behind a torch device: the GPU's, or the CPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _mixtures(model: nn.Module) -> dict[str, Mixture]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}
    if not found:
        raise InputError("the model has no mixture of experts to measure: convert it first")
    return found


def _layers(mixture: Mixture) -> tuple[tuple[int, int], ...]:
    added = tuple(f"{name}." for name in mixture.added_children)
    named = [(f"{name}.", child) for name, child in mixture.named_modules() if isinstance(child, nn.Linear)]
    return tuple((child.out_features, child.in_features) for name, child in named if not name.startswith(added))


def _tokens(
    model: nn.Module, mixtures: Mapping[str, Mixture], example_input: Tensor | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run the model once and return what each mixture got, as (T, C)."""
    tokens: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: tokens.update({name: arguments[0].reshape(-1, arguments[0].shape[-1])})

    hooks = [mixture.register_forward_pre_hook(keep(name)) for name, mixture in mixtures.items()]
    try:
        with evaluating(model):
            if isinstance(example_input, Tensor):
                model(example_input)
            else:
                model(**example_input)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name in mixtures if name not in tokens or not len(tokens[name])]
    if missed:
        raise InputError(f"{missed[0]} got no tokens from the example input: give one that runs the whole model")
    return tokens


def _time(experts: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Return median seconds of one call by expert; they take turns, so that drift hits all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in experts}
    names = list(experts)
    for turn in range(-2, repeats):  # the first two only warm up
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronise(x)
            begin = time.perf_counter()
            experts[name](x)
            _synchronise(x)
            if turn >= 0:
                samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in samples.items()}


def _synchronise(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
