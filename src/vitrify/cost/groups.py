"""Module groups: the modules of a model that play the same role, all blocks together."""

from __future__ import annotations

from collections.abc import Sequence

_CORE = ("core", "value_conv")


def group_of(module: str, step: str = "") -> str:
    """Return the group that a module belongs to, by its qualified name, its numbers starred; "(model)" for the model.

    Groups end with the first name after the last number (a block's attention with its projections, its MLP, a norm), or
    with the second name if there is no number.
    What attention computes between its projections (`step`, or our core and convolution on V) is a group of its own.

    >>> group_of("blocks.3.attn.qkv"), group_of("blocks.3.attn", "softmax"), group_of("blocks.3.mlp.fc1")
    ('blocks.*.attn', 'blocks.*.attn core', 'blocks.*.mlp')
    >>> group_of("patch_embed.proj"), group_of("head"), group_of("")
    ('patch_embed.proj', 'head', '(model)')
    """
    parts = ["*" if part.isdigit() else part for part in module.split(".")]
    inside = step or any(name in parts for name in _CORE)
    group = ".".join(_cut(parts)) or "(model)"
    return f"{group} core" if inside else group


def _cut(parts: Sequence[str]) -> Sequence[str]:
    stars = [index for index, part in enumerate(parts) if part == "*"]
    return parts[: stars[-1] + 2] if stars else parts[:2]
