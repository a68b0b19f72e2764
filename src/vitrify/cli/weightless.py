"""MODEL for commands that ask only for its shapes: built without memory for its weights, where that can be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrify.cli import options

if TYPE_CHECKING:
    from torch import nn


def load(spec: str, img_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the model that MODEL means, in eval mode, and the (channels, height, width) that it is to be asked about.

    timm's models are built on the meta device. Artefacts have their weights; transformers looks at values as it builds.
    """
    import torch

    if options.artefact_at(spec) is not None or spec.startswith("hf:"):
        model = options.load_model(spec, img_size=img_size)
    else:
        with torch.device("meta"):
            model = options.load_model(spec, img_size=img_size)
    return model.eval(), asked_size(model, img_size)


def asked_size(model: nn.Module, img_size: int | None) -> tuple[int, int, int]:
    """Return the (channels, height, width) of the images that the model and --img-size stand for."""
    from vitrify.artefact import input_config

    channels, height, width = input_config(model)["input_size"]
    # A pyramid takes any size, and keeps no record of the one that was asked for.
    return channels, img_size or height, img_size or width
