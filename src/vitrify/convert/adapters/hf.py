"""Hugging Face's vision attentions: ViT, DeiT, DINOv2 and SigLIP, which differ in names and little else.

The softmax core calls the attention function that `config._attn_implementation` names (eager, sdpa, flash, flex), as
the source does, and hands its attention weights on. Taylor cores have none: a call that asks for them raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deit import modeling_deit
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip.configuration_siglip import SiglipTextConfig
from transformers.models.vit import modeling_vit

from vitrify.convert.adapters.base import Adapter, watching
from vitrify.convert.specs import AttentionSpec
from vitrify.errors import UnsupportedError
from vitrify.nn import Softmax, TokenGrid
from vitrify.nn.cores import Dropout

# Arguments that models hand down to attention and that do not concern it.
_IRRELEVANT = {"num_items_in_batch", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"}


class HFSoftmax(Softmax):
    """Softmax attention by the function that the model's configuration names when it is called.

    `fused` set to False computes the weights in plain PyTorch, whatever the configuration says.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        function: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Attend; shapes in `nn.cores`. function: (query, key, value, attn_mask) -> (B, N, H, D)."""
        if function is not None and self.fused:
            return function(query, key, value, attn_mask).transpose(1, 2)
        return super().forward(
            query, key, value, attn_mask, scale=scale, dropout_p=dropout_p, bias=bias, is_causal=is_causal
        )


class HFAdapter(Adapter):
    """What the four attentions share; subclasses name what differs."""

    eager: ClassVar[Callable[..., tuple[Tensor, Tensor | None]]]
    upcast: ClassVar[bool] = True  # eager attention takes the softmax in float32
    scale_name: ClassVar[str] = "scaling"
    output_name: ClassVar[str] = "o_proj"
    dropout_name: ClassVar[str] = "attention_dropout"

    config: Any
    head_dim: int
    is_causal: bool

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over hidden_states (B, N, C); the source's call. Returns (output, attention weights or None).

        With a Taylor core it raises UnsupportedError where attention weights are asked for, where the mask is not key
        padding, and for arguments that change the attention.
        """
        input_shape = hidden_states.shape[:-1]
        shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        scale = getattr(self, self.scale_name)
        dropout_p = self.dropout_p(self) if self.training else 0.0

        weights: list[Tensor | None] = [None]
        if isinstance(self.core, HFSoftmax):
            source = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
            arguments = {"scaling": scale, "dropout": dropout_p, **self.function_arguments(kwargs)}

            def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
                attended: Tensor
                attended, weights[0] = source(self, query, key, value, mask, **arguments)
                return attended

            out = self.core(query, key, value, attention_mask, scale=scale, dropout_p=dropout_p, function=function)
            # The convolution takes key padding only; without one the mask is the source's own business.
            padding = None if self.value_conv is None else key_padding(attention_mask)
        else:
            self.check_arguments(kwargs)
            padding = key_padding(attention_mask)
            out = self.core(query, key, value, padding, scale=scale, dropout_p=dropout_p)
        if self.value_conv is not None:
            assert self.token_grid is not None  # find_grid refuses where there is none
            out = out + self.convolve(value, self.token_grid.size(), padding)

        out = out.transpose(1, 2).reshape(*input_shape, -1).contiguous()
        return getattr(self, self.output_name)(out), weights[0]

    def function_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what the source hands to the attention function beside q, k, v, mask, scale and dropout."""
        return kwargs

    def check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Raise UnsupportedError for an argument of the call that linear attention cannot honour."""
        core = type(self.core).__name__
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise UnsupportedError(
                f"output_attentions=True: the {core} core never forms attention weights; "
                "ask for output_attentions=False, or keep softmax in the modules to be looked at"
            )
        for name, value in self.function_arguments(kwargs).items():
            if name not in _IRRELEVANT and value is not None and value is not False:
                raise UnsupportedError(f"{name}={value!r} changes softmax attention in a way the {core} core cannot")

    @classmethod
    def softmax_core(cls, module: Any) -> Softmax:
        """Return the core that calls the configured attention function."""
        return HFSoftmax(scale_on="scores", upcast=cls.upcast)

    @classmethod
    def example_inputs(cls, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return tokens (2, 7, C)."""
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(2, 7, module.q_proj.in_features, generator=generator),), {}

    @classmethod
    def value_channels(cls, module: Any) -> int:
        """Return heads * head_dim."""
        return int(module.v_proj.out_features)

    @classmethod
    def dropout_p(cls, module: Any) -> float:
        """Return the configured dropout of attention weights."""
        return float(getattr(module, cls.dropout_name))

    @classmethod
    def refusal(cls, module: Any, spec: AttentionSpec) -> str | None:
        """Refuse releases of transformers with another layout, causal attention, and text towers."""
        if not hasattr(module, "q_proj"):
            return "this release of transformers builds the module without q_proj; the adapter follows release 5.23"
        if isinstance(module.config, SiglipTextConfig):
            return "belongs to a text tower; only vision encoders are converted"
        if spec.core != "softmax" and module.is_causal:
            return "is_causal: linear attention sums over all keys at once"
        return super().refusal(module, spec)

    @classmethod
    def query_heads(cls, module: Any) -> tuple[int, int]:
        """Return (heads, width of a query), from the projection: the classes name their head counts differently."""
        return module.q_proj.out_features // module.head_dim, int(module.head_dim)

    @classmethod
    def find_grid(cls, module: Any, ancestors: Sequence[nn.Module]) -> TokenGrid | str | None:
        """Return the grid of the embeddings of the nearest encoder around the module."""
        for ancestor in reversed(ancestors):
            embeddings = getattr(ancestor, "embeddings", None)
            if isinstance(embeddings, nn.Module) and type(embeddings) in _PREFIX_TOKENS:
                return EmbeddingsGrid.of(embeddings)
        return super().find_grid(module, ancestors)


class HFViTAttention(HFAdapter, modeling_vit.ViTAttention):  # type: ignore[misc]  # transformers has no types
    """ViT."""

    source = modeling_vit.ViTAttention
    eager = staticmethod(modeling_vit.eager_attention_forward)


class HFDeiTAttention(HFAdapter, modeling_deit.DeiTAttention):  # type: ignore[misc]
    """DeiT."""

    source = modeling_deit.DeiTAttention
    eager = staticmethod(modeling_deit.eager_attention_forward)


class HFDinov2Attention(HFAdapter, modeling_dinov2.Dinov2Attention):  # type: ignore[misc]
    """DINOv2 without registers."""

    source = modeling_dinov2.Dinov2Attention
    eager = staticmethod(modeling_dinov2.eager_attention_forward)
    upcast = False


class HFSiglipAttention(HFAdapter, modeling_siglip.SiglipAttention):  # type: ignore[misc]
    """SigLIP's vision tower; its pooling head attends with nn.MultiheadAttention, and is refused."""

    source = modeling_siglip.SiglipAttention
    eager = staticmethod(modeling_siglip.eager_attention_forward)
    scale_name = "scale"
    output_name = "out_proj"
    dropout_name = "dropout"

    def function_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the causal flag alone, as the source does."""
        return {"is_causal": self.is_causal}


_PREFIX_TOKENS = {
    modeling_vit.ViTEmbeddings: 1,
    modeling_deit.DeiTEmbeddings: 2,
    modeling_dinov2.Dinov2Embeddings: 1,
    modeling_siglip.SiglipVisionEmbeddings: 0,
}


class EmbeddingsGrid(TokenGrid):
    """The grid of an encoder, written when the image enters its embeddings, whatever its size."""

    def __init__(self, num_prefix_tokens: int, patch_size: tuple[int, int]) -> None:
        super().__init__(num_prefix_tokens)
        self.patch_size = patch_size

    @classmethod
    def of(cls, embeddings: nn.Module) -> EmbeddingsGrid:
        """Return the grid of these embeddings, watching them from now on."""
        grid: EmbeddingsGrid | None = watching(embeddings, cls)
        if grid is None:
            conv = next(m for m in embeddings.modules() if isinstance(m, nn.Conv2d))
            grid = cls(_PREFIX_TOKENS[type(embeddings)], (conv.stride[0], conv.stride[1]))
            embeddings.register_forward_pre_hook(grid.watch, with_kwargs=True)
        return grid

    def watch(self, embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the grid of the image about to be embedded; pixels beyond the last whole patch are not used."""
        height, width = (args[0] if args else kwargs["pixel_values"]).shape[-2:]
        self.record(height // self.patch_size[0], width // self.patch_size[1])


def key_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Return the padding that a mask of transformers stands for, as bool (B, 1, 1, Nk), True = attend.

    Taken: bool (B, Nk), and (B, 1, Nq, Nk), equal for all queries: bool, or additive with 0 to attend and -inf or the
    dtype's lowest number to ignore. Raises UnsupportedError for anything else; under torch.compile, which cannot branch
    on values, RuntimeError.
    """
    if attention_mask is None:
        return None
    wanted = "Taylor attention takes key padding only, equal for all heads and queries"
    if not isinstance(attention_mask, Tensor):
        raise UnsupportedError(f"attention_mask is a {type(attention_mask).__name__}: {wanted}")
    dtype, shape = attention_mask.dtype, tuple(attention_mask.shape)
    if dtype == torch.bool and len(shape) == 2:
        return attention_mask[:, None, None, :]
    if len(shape) != 4 or shape[1] != 1 or not (dtype == torch.bool or dtype.is_floating_point):
        raise UnsupportedError(f"attention_mask is {dtype} of shape {shape}: {wanted}")
    keys = attention_mask[:, :, :1]
    exact = (attention_mask == keys).all()
    if dtype != torch.bool:
        ignored = keys <= torch.finfo(dtype).min
        keys = keys == 0
        exact = exact & (keys | ignored).all()
    problem = f"attention_mask varies over queries, or adds something other than 0 and -inf: {wanted}"
    if torch.compiler.is_compiling():
        torch._assert_async(exact, problem)
    elif not exact:
        raise UnsupportedError(problem)
    return keys
