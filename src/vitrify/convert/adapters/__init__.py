"""The registry of adapters, by exact class, and what is known about attention classes that have none.

Adapter modules import the library they adapt, so they are loaded only when a model holds one of its classes. Parts of
vitrify that bring models of their own `register` adapters for them.
"""

from __future__ import annotations

import importlib
import re

from torch import nn

from vitrify.convert.adapters.base import Adapter

_HERE = "vitrify.convert.adapters"

# Qualified name of an attention class -> the module and class of its adapter.
_ADAPTERS = {
    "timm.layers.attention.Attention": ("timm_vit", "ViTAttention"),
    "timm.models.vision_transformer.Attention": ("timm_vit", "ViTAttention"),
    "timm.models.pvt_v2.Attention": ("timm_pvt", "PVTAttention"),
    "timm.models.levit.Attention": ("timm_levit", "LeViTAttention"),
    "timm.models.levit.AttentionDownsample": ("timm_levit", "LeViTAttentionDownsample"),
    "transformers.models.vit.modeling_vit.ViTAttention": ("hf", "HFViTAttention"),
    "transformers.models.deit.modeling_deit.DeiTAttention": ("hf", "HFDeiTAttention"),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": ("hf", "HFDinov2Attention"),
    "transformers.models.siglip.modeling_siglip.SiglipAttention": ("hf", "HFSiglipAttention"),
}

# Why a class that looks convertible is not. Any other attention class is refused as having no adapter.
_REASONS = {
    "timm.models.xcit.XCA": "attends over channels, not tokens: it is linear in the tokens already",
    "timm.models.davit.ChannelAttention": "attends over channels, not tokens: it is linear in the tokens already",
    "timm.models.davit.ChannelAttentionV2": "attends over channels, not tokens: it is linear in the tokens already",
    "timm.models.edgenext.CrossCovarianceAttn": "attends over channels, not tokens: it is linear in the tokens already",
    "timm.models.mobilevit.LinearSelfAttention": "is linear in the tokens already",
    "timm.layers.diff_attention.DiffAttention": "subtracts two softmax maps, which one Taylor expansion cannot follow",
    "timm.models.cait.TalkingHeadAttn": "mixes the attention maps of its heads before and after softmax",
    "timm.models.cait.ClassAttn": "has the class token as its only query, so softmax is linear in the tokens already",
    "timm.models.swin_transformer.WindowAttention": "attends in shifting windows, with a position bias and a mask",
    "timm.models.swin_transformer_v2.WindowAttention": "attends by cosine in shifting windows, with a learned bias",
    "timm.models.eva.EvaAttention": "rotates queries and keys by position; no adapter carries that yet",
    "timm.layers.attention.AttentionRope": "rotates queries and keys by position; no adapter carries that yet",
    "timm.models.beit.Attention": "adds a relative position bias, which no adapter carries for this class",
    "timm.models.vision_transformer_relpos.RelPosAttention": "adds a relative position bias, which no adapter carries",
    "timm.layers.attention_pool.AttentionPoolLatent": "pools with learned queries: too few of them to gain anything",
}

_REGISTERED: dict[type[nn.Module], type[Adapter]] = {}
_WITHOUT_PRODUCTS: dict[type[nn.Module], str] = {}

_NAME = re.compile(r"Attention|Attn|XCA$")
_PROJECTIONS = ("qkv", "q", "kv", "qk", "q_proj", "k_proj", "qkv_proj", "in_proj", "to_qkv", "query", "key")


def register(adapter: type[Adapter]) -> None:
    """Make `convert_` use `adapter` for modules of its source class."""
    _REGISTERED[adapter.source] = adapter


def register_without_products(cls: type[nn.Module], reason: str) -> None:
    """Say that attention of this exact class has no products to replace: it is kept, its linear layers are not."""
    _WITHOUT_PRODUCTS[cls] = reason


def qualified_name(cls: type) -> str:
    """Return module and name of a class, as the registry spells them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def adapter_for(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter of the module's exact class (or the one it already is), or None."""
    cls = type(module)
    if issubclass(cls, Adapter):
        return cls
    if cls in _REGISTERED:
        return _REGISTERED[cls]
    if qualified_name(cls) not in _ADAPTERS:
        return None
    module_name, class_name = _ADAPTERS[qualified_name(cls)]
    adapter: type[Adapter] = getattr(importlib.import_module(f"{_HERE}.{module_name}"), class_name)
    # A class that was patched over after the import has the same name but is another class.
    return adapter if adapter.source is cls else None


def looks_like_attention(module: nn.Module) -> bool:
    """Return whether a module attends, by its class's name or by owning heads and query projections."""
    if _NAME.search(type(module).__name__):
        return True
    has_heads = hasattr(module, "num_heads") or hasattr(module, "num_attention_heads")
    return has_heads and any(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)


def without_products(module: nn.Module) -> str | None:
    """Return why there is nothing to replace in an attention module, or None."""
    return _WITHOUT_PRODUCTS.get(type(module))


def no_adapter_reason(module: nn.Module) -> str:
    """Return why an attention-like module without an adapter is refused; the reason names its class."""
    name = qualified_name(type(module))
    return f"{name} {_REASONS.get(name, 'has no adapter, so its output could not be kept')}"
