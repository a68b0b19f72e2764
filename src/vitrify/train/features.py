"""What an encoder computes on the way: the blocks around its attention modules, its tokens, its pooled features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn.attention import named_cores


def converted_blocks(model: nn.Module) -> list[str]:
    """Return the names of the blocks that hold converted attention, in the order in which they run.

    A block is the nearest ancestor of an attention module (or itself) that is an item of a ModuleList or Sequential:
    a transformer block in timm and Hugging Face models, a stage for LeViT's down-sampling attention.
    """
    modules = dict(model.named_modules())
    blocks: dict[str, None] = {}
    for core in named_cores(model):
        parts = core.rpartition(".")[0].split(".")
        lengths = range(len(parts), 0, -1)
        items = (n for n in lengths if isinstance(modules[".".join(parts[: n - 1])], (nn.ModuleList, nn.Sequential)))
        blocks[".".join(parts[: next(items, max(1, len(parts) - 1))])] = None
    return list(blocks)


class BlockFeatures:
    """Context manager: collects what the named blocks of a model put out while it runs.

    >>> with BlockFeatures(model, converted_blocks(model)) as blocks:
    ...     logits = model(images)
    >>> blocks.outputs["blocks.0"]      # (batch, tokens, embed_dim)
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._model, self._names = model, names
        self._handles: list[Any] = []

    def __enter__(self) -> BlockFeatures:
        for name in self._names:
            hook = self._collector(name)
            self._handles.append(self._model.get_submodule(name).register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _collector(self, name: str) -> Any:
        def collect(_module: nn.Module, _args: Any, output: Any) -> None:
            # Hugging Face blocks may return (hidden_states, ...).
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return collect


def encode(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the encoder's output tokens (batch, tokens, embed_dim) and pooled features (batch, channels).

    timm: `forward_features`, and the pooled features before the classifier. Hugging Face: `last_hidden_state` of the
    base model, and `pooler_output` where there is one, else the mean token. Maps (B, C, H, W) become tokens.
    Raises UnsupportedError for a model that is neither.
    """
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        features = model.forward_features(images)
        return _as_tokens(features), model.forward_head(features, pre_logits=True)
    output = getattr(model, "base_model", model)(images)
    if not hasattr(output, "last_hidden_state"):
        raise UnsupportedError(
            f"{type(model).__name__} has neither forward_features and forward_head (timm) nor last_hidden_state "
            f"(Hugging Face): its tokens cannot be read"
        )
    pooled = getattr(output, "pooler_output", None)
    tokens = _as_tokens(output.last_hidden_state)
    return tokens, tokens.mean(1) if pooled is None else pooled


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class logits (batch, classes) in float32 of a timm model or a Hugging Face classifier."""
    output = model(images)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UnsupportedError(f"{type(model).__name__} returns {type(output).__name__}, not logits (batch, classes)")
    return logits.float()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error relative to the teacher's variance (over tokens): 0 is equal, 1 is a constant guess."""
    if student.shape != teacher.shape:
        raise InputError(f"student features {tuple(student.shape)} differ from the teacher's {tuple(teacher.shape)}")
    student, teacher = student.float(), teacher.float()
    variance = (teacher - teacher.mean(dim=(0, 1), keepdim=True)).square().mean()
    return (student - teacher).square().mean() / variance.clamp_min(1e-12)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarity over the last dimension, in float32."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def _as_tokens(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


@torch.no_grad()
def check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Raise InputError if `teacher` shares weights with `model`: it would move along with what it teaches."""
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    if any(parameter.data_ptr() in mine for parameter in teacher.parameters()):
        raise InputError(
            "the teacher shares weights with the model: convert_ works in place, so copy.deepcopy the model first"
        )
