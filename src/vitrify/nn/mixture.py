"""Mixtures of primitives (ShiftAddViT): a router sends each token through a multiplying or a shifting expert.

Both kinds are made in place from a module, which becomes its own multiplying expert: its Parameters, state-dict keys,
hooks and mode stay. What is added are the children `router` and one per other expert, by the expert's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError, unknown
from vitrify.nn.copying import copy_without_hooks
from vitrify.nn.integer import IntLinear
from vitrify.nn.mixture_grouped import grouped_experts, grouped_forward
from vitrify.nn.shift import ShiftLinear
from vitrify.ops.experts import LOADS, Expert, balance_losses, check_alpha, dispatch, route
from vitrify.ops.tracing import exporting

MULTIPLY = "multiply"

# Turn the linear layers of an expert, a copy of the source, into its primitive: (linear, bits, variant, activations).
EXPERTS: dict[str, Callable[[nn.Linear, int, str, str], object]] = {
    "shift": ShiftLinear.adopt_,
    "int8": lambda linear, *_: IntLinear.adopt_(linear, 8),
}

ROUTER_STD = 0.02
"""Of the router's initial weights: on normalised tokens it already tells them apart, so that a small step of its bias
moves some tokens and not all of them."""


class Mixture(nn.Module):
    """What MixtureLinear and MixtureMlp share; comes before the source class in their order of bases.

    alpha    latency of each expert, in any unit: the faster, the more tokens the balancing losses ask for
    balance  factor of the balancing losses (the paper's lambda)
    load     what they sum: "hard", the tokens really dispatched, or "smooth", as published (`ops.balance_losses`)
    share    (E,) float32 buffer, not saved: the part of the tokens that each expert got in the last forward; NaN before
    """

    source: ClassVar[type[nn.Module]]
    router: nn.Linear
    share: Tensor
    alpha: tuple[float, ...]
    balance: float
    load: str
    expert_names: tuple[str, ...]
    _logits: Tensor | None

    @property
    def added_children(self) -> tuple[str, ...]:
        """Names of the children that the source did not have: the router and all experts but the source itself."""
        return ("router", *self.expert_names[1:])

    def experts(self) -> dict[str, Expert]:
        """Return the experts by name in the router's order: each takes tokens (T, C) and returns (T, C_out)."""
        return {name: self._multiply if name == MULTIPLY else getattr(self, name) for name in self.expert_names}

    def _multiply(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C_out): each token's row is exactly what its expert gives.

        On a GPU both experts of multiply and shift run in one launch per layer, in training too: see `mixture_grouped`.
        """
        if (grouped := grouped_forward(self, x)) is not None:
            out, share = grouped
            self._logits = None
            self.share.copy_(share)
            return out
        logits = self.router(x)
        index, gate = route(logits)
        together = grouped_experts(self, x, index)
        out = dispatch(x, index, list(self.experts().values())) if together is None else together
        if torch.is_grad_enabled():  # the gate is 1: only its gradient matters
            out = out * gate.unsqueeze(-1).to(out.dtype)
        # While a checkpointed block is recomputed inside the backward pass, the logits would keep all it recomputes.
        if not exporting(x) and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
            self._record(logits, index)
        return out

    def _record(self, logits: Tensor, index: Tensor) -> None:
        self._logits = logits if self.training else None
        numbers = torch.arange(len(self.expert_names), device=index.device)
        # A buffer, so that compiled graphs write it too.
        self.share.copy_((index.reshape(-1, 1) == numbers).float().mean(0))

    def aux_losses(self) -> dict[str, Tensor]:
        """Return {"importance", "load"} of the last training forward, times `balance`; {} in eval mode or before one.

        Raises InputError if that forward recorded no gradient, as under re-entrant checkpointing: the router would
        silently not learn.
        """
        if not self.training or self._logits is None:
            return {}
        learns = any(parameter.requires_grad for parameter in self.router.parameters())
        if torch.is_grad_enabled() and learns and not self._logits.requires_grad:
            raise InputError(
                "the balancing losses have no gradient: the last training forward ran without one, as it does under "
                "re-entrant gradient checkpointing; use checkpoint(..., use_reentrant=False)"
            )
        wide = torch.promote_types(self._logits.dtype, torch.float32)
        p = self._logits.softmax(-1, dtype=wide).reshape(-1, len(self.expert_names))
        importance, load = balance_losses(p, self.alpha, load=self.load)
        return {"importance": self.balance * importance, "load": self.balance * load}

    def set_alpha(self, alpha: Sequence[float]) -> None:
        """Set the experts' latencies, in the order of `expert_names`; raises InputError if they do not fit."""
        check_alpha(alpha, len(self.expert_names))
        self.alpha = tuple(float(value) for value in alpha)

    def pack_(self) -> None:
        """Replace the latent weights of the shift experts by packed codes, for deployment."""
        for name in self.expert_names[1:]:
            for child in getattr(self, name).modules():
                if isinstance(child, ShiftLinear) and not child.packed:
                    child.pack_()

    def restore_(self) -> nn.Module:
        """Turn the module back into its source, in place: router and other experts are dropped."""
        for name in self.added_children:
            delattr(self, name)
        for name in ("share", "alpha", "balance", "load", "expert_names", "_logits"):
            delattr(self, name)
        self.__class__ = self.source  # type: ignore[assignment]
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep the share in float32 when the model is cast: bfloat16 holds two digits of it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.share = self.share.float()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The logits belong to one forward's graph, and tensors with a history can be neither copied nor pickled.
        return {**self.__dict__, "_logits": None}

    def extra_repr(self) -> str:
        """Add the experts and their latencies to the source's description."""
        own = f"experts={self.expert_names}, alpha={self.alpha}, balance={self.balance}, load={self.load!r}"
        return ", ".join(filter(None, [super().extra_repr(), own]))


class MixtureLinear(Mixture, nn.Linear):
    """A linear layer as a mixture of primitives, with a router of its own. ShiftAddViT; docs/papers.md 8."""

    source = nn.Linear

    @classmethod
    def adopt_(
        cls,
        linear: nn.Linear,
        experts: Sequence[str] = (MULTIPLY, "shift"),
        *,
        bits: int = 4,
        variant: str = "ps",
        activations: str = "float",
        seed: int = 0,
        alpha: Sequence[float] = (6.0, 4.0),
        balance: float = 0.01,
        load: str = "hard",
    ) -> MixtureLinear:
        """Turn `linear` into a mixture in place, with its own weight as the multiplying expert; return it.

        experts: "multiply" first, then names of `EXPERTS`. bits, variant, activations: of the shift expert. seed: of
        the router's weights. alpha: the paper's 6 : 4 until `measure_latencies_` has measured. balance, load: see
        Mixture.
        Raises InputError (names, numbers) and UnsupportedError (a subclass of nn.Linear).
        """
        if type(linear) is not nn.Linear:
            raise UnsupportedError(f"{type(linear).__name__} is not a plain nn.Linear: its own forward would be lost")
        _add_experts_(linear, cls, experts, bits, variant, activations, seed, alpha, balance, load)
        return cast("MixtureLinear", linear)


class MixtureMlp(Mixture):
    """A token-wise MLP as a mixture of primitives: one router sends a token through the whole of it.

    Instances belong to a subclass made for their source class (`source`), so `isinstance(module, source)` stays true.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The subclass has no importable name: copies and pickles name its source.
        return _blank, (self.source,), self.__getstate__()


def mixture_mlp_(
    module: nn.Module,
    experts: Sequence[str] = (MULTIPLY, "shift"),
    *,
    bits: int = 4,
    variant: str = "ps",
    activations: str = "float",
    seed: int = 0,
    alpha: Sequence[float] = (6.0, 4.0),
    balance: float = 0.01,
    load: str = "hard",
) -> MixtureMlp:
    """Turn an MLP into a MixtureMlp in place and return it; arguments as MixtureLinear.adopt_.

    The other experts are copies of the MLP whose linear layers compute with their primitive; everything else in it
    (norms, gates, dropout) is copied as it is. `module(x)` takes tokens (..., C) and treats each by itself.
    Raises InputError (names, numbers) and UnsupportedError for an MLP that mixes tokens (convolutions, batch
    statistics), that iterates over its children, or whose linear layers are none or no plain nn.Linear.
    """
    layers = [child for child in module.modules() if isinstance(child, nn.Linear)]
    odd = next((layer for layer in layers if type(layer) is not nn.Linear), None)
    if odd is not None:
        raise UnsupportedError(f"{type(module).__name__} holds a {type(odd).__name__}, which is no plain nn.Linear")
    if not layers or isinstance(module, (nn.Linear, nn.Sequential)):
        raise UnsupportedError(f"{type(module).__name__} is no MLP module with linear layers in it: use MixtureLinear")
    for name, child in module.named_modules():
        if isinstance(child, (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd)):
            raise UnsupportedError(f"{name} ({type(child).__name__}) mixes tokens: use MixtureLinear on its linears")
    _add_experts_(module, _mixture_class(type(module)), experts, bits, variant, activations, seed, alpha, balance, load)
    return cast("MixtureMlp", module)


_MLP_CLASSES: dict[type[nn.Module], type[MixtureMlp]] = {}


def _mixture_class(source: type[nn.Module]) -> type[MixtureMlp]:
    if source not in _MLP_CLASSES:
        namespace = {"source": source, "__doc__": MixtureMlp.__doc__}
        _MLP_CLASSES[source] = type(f"Mixture{source.__name__}", (MixtureMlp, source), namespace)
    return _MLP_CLASSES[source]


def _blank(source: type[nn.Module]) -> MixtureMlp:
    kind = _mixture_class(source)
    return kind.__new__(kind)


def _add_experts_(
    module: nn.Module,
    kind: type[Mixture],
    names: Sequence[str],
    bits: int,
    variant: str,
    activations: str,
    seed: int,
    alpha: Sequence[float],
    balance: float,
    load: str,
) -> None:
    _check(module, names, balance, load)
    if activations != "float" and "shift" not in names:
        raise InputError(f"activations {activations!r} belong to the expert 'shift', and there is none: {tuple(names)}")
    check_alpha(alpha, len(names))
    # The whole of what may fail comes before the module is touched.
    added = {name: _expert(module, name, bits, variant, activations) for name in names[1:]}
    added["router"] = _router(
        next(layer for layer in module.modules() if isinstance(layer, nn.Linear)), len(names), seed
    )
    module.__class__ = kind
    mixture = cast("Mixture", module)
    for name, child in added.items():
        mixture.add_module(name, child.train(mixture.training))
    device = mixture.router.weight.device
    mixture.register_buffer("share", torch.full((len(names),), float("nan"), device=device), persistent=False)
    mixture.expert_names = tuple(names)
    mixture.balance, mixture.load, mixture._logits = balance, load, None
    mixture.set_alpha(alpha)


def _expert(module: nn.Module, name: str, bits: int, variant: str, activations: str) -> nn.Module:
    expert = copy_without_hooks(module)
    for layer in [child for child in expert.modules() if isinstance(child, nn.Linear)]:
        EXPERTS[name](layer, bits, variant, activations)
    return expert


def _router(first: nn.Linear, num_experts: int, seed: int) -> nn.Linear:
    """Return the router for tokens as wide as `first` takes them, which is the MLP's first layer."""
    weight = first.weight
    # skip_init: nn.Linear's own initialisation would draw from the global generator.
    router: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, first.in_features, num_experts, device=weight.device, dtype=weight.dtype
    )
    noise = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        router.weight.copy_(ROUTER_STD * noise)
        router.bias.zero_()
    return router


def _check(module: nn.Module, names: Sequence[str], balance: float, load: str) -> None:
    if len(names) < 2 or names[0] != MULTIPLY or len(set(names)) < len(names):
        raise InputError(f"experts {tuple(names)}: 'multiply' comes first, then at least one other, each once")
    for name in names[1:]:
        if name not in EXPERTS:
            raise unknown("expert", name, EXPERTS)
    if not balance >= 0:
        raise InputError(f"balance must be 0 or a positive factor, not {balance}")
    if load not in LOADS:
        raise unknown("load", load, LOADS)
    taken = [name for name in ("router", "share", "alpha", "balance", "load", *names[1:]) if hasattr(module, name)]
    if taken:
        raise UnsupportedError(f"{type(module).__name__} already has {taken[0]!r}, which a mixture adds")
