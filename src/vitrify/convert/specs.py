"""What one module becomes: frozen specs for attention and for linear layers, each checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vitrify.errors import InputError, unknown

CoreName = Literal["softmax", "taylor", "taylor_sparse", "sparse", "hamming"]
BiasRule = Literal["carry", "drop"]
Order = Literal["linear", "quadratic"]
Codes = Literal["binary", "sign"]
Binariser = Literal["learned", "token_mean", "ksh"]
Form = Literal["published", "taylor"]
Reduction = Literal["keep", "remove"]
Primitive = Literal["multiply", "shift", "mixture", "integer"]
Variant = Literal["ps", "q"]
Load = Literal["hard", "smooth"]
Activations = Literal["float", "int8", "float8"]

# What a spec's own errors call it; `recipe` replaces it by the field that the spec was read from.
ATTENTION, LINEAR = "attention", "linear"


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention module becomes.

    core        "softmax" (as it was), "taylor", "taylor_sparse" (Taylor, plus a sparse part in training), "sparse"
                (softmax over predicted entries: a baseline) or "hamming" (queries and keys as binary codes, so that
                attention only adds; ShiftAddViT)
    squares     add the squares of the second-order term; core "taylor" only
    value_conv  kernel size (odd) of a depth-wise convolution on V; 0 for none
    threshold   predicted probability from which the sparse part keeps an entry; n tokens attend uniformly with 1/n
    bits        width of the predictor
    bias        a bias on the logits (LeViT): "carry" it as a token-mixing term, at n^2 d_v, or "drop" it
    reduction   spatial reduction of keys and values (PVT): "keep" it, or "remove" it, so that they live on the queries'
                grid; its parameters then stay in the state dict without being used

    Core "hamming" alone:
    order       "linear", C_q (C_k^T V), which only adds, or "quadratic", (C_q C_k^T) V
    codes       "binary", {0, 1}, or "sign", {-1, +1}
    binariser   "learned" (a threshold per head and channel), "token_mean" (the mean over the token's channels) or "ksh"
                (EcoFormer's kernelised hashing)
    share_codes one binariser for queries and keys
    form        "published" (V/2 + C_q (C_k^T V) / pi, normalised per token and head), or "taylor": first-order Taylor
                attention on the codes, which starts nearer to the original and needs no V on the queries' grid
    """

    core: CoreName = "softmax"
    squares: bool = False
    value_conv: int = 0
    threshold: float = 0.02
    bits: int = 4
    bias: BiasRule = "carry"
    reduction: Reduction = "keep"
    order: Order = "linear"
    codes: Codes = "binary"
    binariser: Binariser = "learned"
    share_codes: bool = False
    form: Form = "published"

    def __post_init__(self) -> None:
        for name, valid in (
            ("core", CoreName),
            ("bias", BiasRule),
            ("reduction", Reduction),
            ("order", Order),
            ("codes", Codes),
            ("binariser", Binariser),
            ("form", Form),
        ):
            _check_choice(self, ATTENTION, name, get_args(valid))
        for name in ("squares", "share_codes"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"attention.{name} must be true or false, not {getattr(self, name)!r}")
        if self.squares and self.core != "taylor":
            raise InputError(f"attention.squares needs attention.core 'taylor', not {self.core!r}")
        if self.core != "hamming":
            self._check_left_alone(("order", "codes", "binariser", "share_codes", "form"))
        if not is_int(self.value_conv) or self.value_conv < 0 or (self.value_conv > 0 and self.value_conv % 2 == 0):
            raise InputError(f"attention.value_conv must be an odd kernel size, or 0 for none, not {self.value_conv!r}")
        if not isinstance(self.threshold, (int, float)) or isinstance(self.threshold, bool):
            raise InputError(f"attention.threshold must be a number in [0, 1], not {self.threshold!r}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"attention.threshold must be in [0, 1], not {self.threshold}")
        if not is_int(self.bits) or not 2 <= self.bits <= 16:
            raise InputError(f"attention.bits must be an integer from 2 to 16, not {self.bits!r}")

    def _check_left_alone(self, names: tuple[str, ...]) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise InputError(f"attention.{name} belongs to attention.core 'hamming', not {self.core!r}")

    def __str__(self) -> str:
        parts: list[str] = [self.core]
        if self.core in ("taylor_sparse", "sparse"):
            parts.append(f"threshold {self.threshold:g}, {self.bits} bits")
        if self.core == "hamming":
            shared = ", shared" if self.share_codes else ""
            parts.append(f"{self.order} order, {self.codes} codes by {self.binariser}{shared}, {self.form} form")
        if self.squares:
            parts.append("with squares")
        if self.value_conv:
            parts.append(f"value_conv {self.value_conv}x{self.value_conv}")
        return ", ".join(parts)


@dataclass(frozen=True)
class LinearSpec:
    """What one linear layer, convolution or MLP becomes.

    primitive   "multiply" (as it was), "shift" (weights s 2^P), "mixture" (a router sends each token to a multiplying
                or a shifting expert) or "integer" (integer multiplication, weights `bits` wide, activations 8: the
                alternative to compare with)
    bits        width of the weights: 3 to 6 for shift and mixture, 4 or 8 for integer
    variant     DeepShift's "ps" (one code means zero) or "q" (one more exponent instead)
    activations what a shift layer, or a mixture's shifting expert, rounds its input to, token by token, in training
                too: "float" (nothing), "int8" (sums of integers, fast on CPUs) or "float8" (E4M3, fast on GPUs that
                multiply it)
    balance     weight of the mixture's latency-aware loss; 0 for none
    load        how the loss counts a token: "hard", to the expert that gets it, or "smooth", as published
    """

    primitive: Primitive = "multiply"
    bits: int = 4
    variant: Variant = "ps"
    balance: float = 0.01
    load: Load = "hard"
    activations: Activations = "float"

    def __post_init__(self) -> None:
        choices = (("primitive", Primitive), ("variant", Variant), ("load", Load), ("activations", Activations))
        for name, valid in choices:
            _check_choice(self, LINEAR, name, get_args(valid))
        widths = (4, 8) if self.primitive == "integer" else (3, 4, 5, 6)
        if not is_int(self.bits) or self.bits not in widths:
            listed = ", ".join(map(str, widths[:-1])) + f" or {widths[-1]}"
            raise InputError(f"linear.bits must be {listed} for {self.primitive!r}, not {self.bits!r}")
        if not isinstance(self.balance, (int, float)) or isinstance(self.balance, bool) or not self.balance >= 0:
            raise InputError(f"linear.balance must be a number of at least 0, not {self.balance!r}")
        if self.activations != "float" and self.primitive not in ("shift", "mixture"):
            raise InputError(
                f"linear.activations {self.activations!r} belongs to linear.primitive 'shift' or 'mixture', "
                f"not {self.primitive!r}"
            )

    def of_mixture(self) -> dict[str, Any]:
        """Return what `MixtureLinear.adopt_` and `mixture_mlp_` are called with."""
        return {name: getattr(self, name) for name in ("bits", "variant", "activations", "balance", "load")}

    def __str__(self) -> str:
        if self.primitive == "multiply":
            return "multiply"
        if self.primitive == "integer":
            return f"integer, weights {self.bits} bits, activations 8"
        parts = [f"{self.primitive}, {self.bits} bits {self.variant}"]
        if self.activations != "float":
            parts.append(f"activations {self.activations}")
        if self.primitive == "mixture":
            parts.append(f"balance {self.balance:g} ({self.load})" if self.balance else "no balance")
        return ", ".join(parts)


Spec = AttentionSpec | LinearSpec


def _check_choice(spec: Any, kind: str, name: str, valid: tuple[str, ...]) -> None:
    if getattr(spec, name) not in valid:
        raise unknown(f"{kind}.{name}", str(getattr(spec, name)), valid)


def is_int(value: Any) -> bool:
    """Say whether it is a whole number, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)
