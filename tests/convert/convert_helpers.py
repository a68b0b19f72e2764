"""Small random models and what the tests observe of them."""

from collections import Counter

import timm
import torch
from torch import nn

from vitrify.convert.copies import randomise


def build(name, **kwargs):
    """A timm model with random numbers in every parameter and buffer, in eval mode."""
    model = timm.create_model(name, **kwargs)
    randomise(model, torch.Generator().manual_seed(7))
    return model.eval()


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**kwargs):
    return build("vit_tiny_patch16_224", **{**VIT, **kwargs})


def observe(model, names, *args, seed=0):
    """Run the model once: (output, outputs of the named modules, calls of each module that a source class owns)."""
    outputs, calls, handles = {}, Counter(), []
    for name, module in model.named_modules():
        added = any(part in name.split(".") for part in ("core", "value_conv"))
        if name and not added:
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: calls.update([name])))
        if name in names:
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o.detach()})))
    torch.manual_seed(seed)
    out = model(*args)
    for handle in handles:
        handle.remove()
    return out, outputs, calls


def attention_names(conversion):
    return [change.name for change in conversion.changed]


class Fake(nn.Module):
    """Owns what attention owns, and is none that vitrify knows."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :8])
