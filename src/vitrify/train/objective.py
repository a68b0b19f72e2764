"""The student and its loss as one module, so that DDP and autocast see the whole step as a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.nn.cores import Softmax
from vitrify.nn.mixture import Mixture
from vitrify.train.tasks import Task


class Objective(nn.Module):
    """forward(batch) -> (loss, logs): the task's loss plus the `aux_losses()` of every module that has some.

    `aux_losses()` returns named scalars of the forward just done; collected here, inside the forward, they survive
    gradient checkpointing and DDP.
    """

    def __init__(self, model: nn.Module, task: Task, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        # In a tuple, the teacher is no submodule: neither DDP nor train() touches it.
        self._fixed = (task, teacher)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss and detached scalars to log, "loss" among them."""
        task, teacher = self._fixed
        loss, logs = task.loss(self.model, batch, teacher)
        for module_name, module in self.model.named_modules():
            collect = getattr(module, "aux_losses", None)
            for name, value in collect().items() if callable(collect) else ():
                loss = loss + value
                logs[f"aux/{module_name}.{name}"] = value.detach()
            if isinstance(module, Mixture):
                # The hard share: a soft one can look balanced while an expert gets nothing.
                shares = zip(module.expert_names, module.share.clone(), strict=True)
                logs |= {f"share/{module_name}.{expert}": share for expert, share in shares}
        logs["loss"] = loss.detach()
        return loss, logs


@contextmanager
def unfused_softmax(model: nn.Module) -> Iterator[None]:
    """Use plain softmax attention for a while: on a CPU the fused kernel's backward takes 2 to 3 times as long."""
    switched: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        name = "fused" if isinstance(module, Softmax) else "fused_attn"
        if getattr(module, name, None) is True:
            setattr(module, name, False)
            switched.append((module, name))
    try:
        yield
    finally:
        for module, name in switched:
            setattr(module, name, True)


@contextmanager
def checkpointed_blocks(model: Any, enabled: bool) -> Iterator[None]:
    """Recompute the blocks in the backward pass for a while. Raises InputError if the model cannot."""
    if not enabled:
        yield
        return
    # transformers renamed its pair of methods; the re-entrant kind would hide the blocks' features from autograd.
    names = [name for name in ("activation", "gradient") if hasattr(model, f"{name}_checkpointing_enable")]
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        disable = partial(model.set_grad_checkpointing, False)
    elif names:
        prefix = f"{names[0]}_checkpointing"
        getattr(model, f"{prefix}_enable")(**{f"{prefix}_kwargs": {"use_reentrant": False}})
        disable = getattr(model, f"{prefix}_disable")
    else:
        raise InputError(f"{type(model).__name__} has no gradient checkpointing: grad_checkpointing must be False")
    try:
        yield
    finally:
        disable()
