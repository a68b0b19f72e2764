"""The launches of every GPU kernel that are compiled ahead of time, by the tests and by tools/compile_report.py.

A primitive registers a function here that yields cases; a case calls the primitive's host code on meta tensors, so
that its own choice of kernels and tiles is what gets compiled. Imports Triton.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrify.ops import gpu
from vitrify.ops.ahead_of_time import ARCHITECTURES, Launch, recorded_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = 12


class Case(NamedTuple):
    """A call of a primitive's host code.

    name           what it computes, on what
    call           runs it on meta tensors; its launches are what is compiled
    quick          whether the quick tests compile it, too
    architectures  compute capabilities that can run it
    plain          kernels in it that multiply nothing, and so use no tensor cores
    large          kept by the host code from GPUs with little shared memory (compute capabilities 8.6, 8.9, 12.0)
    """

    name: str
    call: Callable[[], object]
    quick: bool = False
    architectures: tuple[int, ...] = ARCHITECTURES
    plain: tuple[str, ...] = ()
    large: bool = False

    def launches(self) -> list[Launch]:
        """Return the distinct launches of this case: those of the same kernel with the same constants count once."""
        with recorded_launches() as found:
            self.call()
        distinct = {(launch.name, _known(launch)): launch for launch in found}
        return list(distinct.values())


def taylor() -> Iterator[Case]:
    """Forward and backward passes of whole heads and of shared ones, full and padded, from a packed qkv."""
    triton = gpu.kernels("taylor.triton")

    def both(width: int, dtype: torch.dtype, tokens: int, padded: bool) -> None:
        query, key, value = _qkv(width, dtype, tokens)
        keep = _meta(64, tokens, dtype=torch.bool) if padded else None
        out, state = triton.forward(query, key, value, keep, 0.125)
        triton.backward(out, query, key, value, keep, 0.125, state)

    for width in (16, 64, 80, 128):
        for name, dtype in DTYPES.items():
            for tokens, padded in ((197, False), (197, True), (16_384, False)):
                what = f"forward and backward, {name}, D = {width}, n = {tokens}{', padded' * padded}"
                quick = (width, name, tokens, padded) == (64, "bf16", 197, False)
                call = _later(both, width, dtype, tokens, padded)
                yield Case(what, call, quick, plain=("combine_kernel",), large=name == "fp32" and width > 64)


def hamming() -> Iterator[Case]:
    """Codes as bits, int8 and numbers, of whole heads and of shared ones; backward where codes carry gradients."""
    triton, bits, code_of = (gpu.kernels(f"hamming.{name}") for name in ("triton", "bits", "aten"))

    def run(width: int, dtype: torch.dtype, tokens: int, stored: str, padded: bool) -> None:
        value = _qkv(width, dtype, tokens)[2]
        keep = _meta(64, tokens, dtype=torch.bool) if padded else None
        code = {
            "bits": _meta(64, HEADS, tokens, bits.words(width), dtype=torch.uint8),
            "int8": _meta(64, HEADS, tokens, width, dtype=torch.int8),
            "numbers": value,
        }[stored]
        kind = code_of.Code(width, signed=stored == "bits")
        out, matrices = triton.forward(code, code, value, keep, kind, value.dtype)
        if stored == "numbers":
            triton.backward(out, code, code, value, keep, matrices, kind)

    for width in (16, 64, 80, 128):
        for name in ("bf16", "fp32"):
            dtype = DTYPES[name]
            x, threshold = _qkv(width, dtype, 197)[0], _meta(HEADS, 1, width, dtype=dtype)
            call = _later(triton.threshold_bits, x, threshold)
            yield Case(f"threshold_bits, {name}, D = {width}", call, plain=("pack_kernel",))
    several = [
        *itertools.product(("bits",), (16, 64, 80, 128), ("bf16", "fp32"), (197, 16_384)),
        *itertools.product(("int8", "numbers"), (64, 128), ("bf16", "fp32"), (16_384,)),
    ]
    for stored, width, name, tokens in several:
        for padded in (False, True) if (stored, width) == ("bits", 64) else (False,):
            what = f"codes as {stored}, {name}, D = {width}, n = {tokens}{', padded' * padded}"
            quick = (width, name, stored, tokens, padded) == (64, "bf16", "bits", 197, False)
            call = _later(run, width, DTYPES[name], tokens, stored, padded)
            large = (stored, name) == ("numbers", "fp32") and width > 64
            yield Case(what, call, quick, plain=("join_kernel",), large=large)


def shift() -> Iterator[Case]:
    """Layers of a ViT-B on few tokens (codes in registers) and on many (in memory), and of widths with masks."""
    triton = gpu.kernels("shift.triton")
    plain = ("quantize_kernel", "decode_kernel", "combine_kernel")

    def run(shape: tuple[int, int, int], bits: int, variant: str, dtype: torch.dtype, activations: str) -> None:
        tokens, width, channels = shape
        codes = _meta(channels, -(-width // 2) if bits <= 4 else width, dtype=torch.uint8)
        exponent, bias = _meta(channels, dtype=torch.int8), _meta(channels, dtype=dtype)
        triton.linear(_meta(tokens, width, dtype=dtype), codes, exponent, bias, bits, variant, activations)

    fc1, fc2, masked, least = (768, 3072), (3072, 768), (75, 70), (1, 1)
    several = [
        *itertools.product((64, 197), (fc1,), (4,), ("ps",), DTYPES, ("float",)),
        *itertools.product((1,), (fc2, least), (4,), ("q",), ("bf16",), ("float",)),
        *itertools.product((197,), (fc2, masked), (5,), ("q",), ("bf16", "fp16"), ("float",)),
        *itertools.product((197,), (fc1,), (4, 5, 6), ("ps",), ("bf16",), ("float8",)),
        *itertools.product((64,), (fc2, masked), (4,), ("ps",), ("bf16",), ("int8", "float8")),
        *itertools.product((12_608,), (fc1,), (4,), ("ps",), ("bf16", "fp32"), ("float", "int8", "float8")),
    ]
    for tokens, (width, channels), bits, variant, name, activations in several:
        what = f"{activations}, {bits}-bit {variant}, {name}, ({tokens}, {width}, {channels})"
        quick = (tokens, width, bits, variant, name, activations) == (64, 768, 4, "ps", "bf16", "float")
        call = _later(run, (tokens, width, channels), bits, variant, DTYPES[name], activations)
        yield Case(what, call, quick, _those_with(activations, bits), plain)


def mixture() -> Iterator[Case]:
    """Layers of a ViT-B on few tokens (codes in registers) and on many (in memory), and of widths with masks."""
    triton = gpu.kernels("experts.triton")
    plain = ("choose_kernel", "place_kernel", "quantize_kernel", "decode_kernel")

    def run(shape: tuple[int, int, int], bits: int, variant: str, dtype: torch.dtype, activations: str) -> None:
        tokens, width, channels = shape
        codes = _meta(channels, -(-width // 2) if bits <= 4 else width, dtype=torch.uint8)
        exponent, bias = _meta(channels, dtype=torch.int8), _meta(channels, dtype=dtype)
        x, weight = _meta(tokens, width, dtype=dtype), _meta(channels, width, dtype=dtype)
        order, counts = triton.order_tokens(x, _meta(2, width, dtype=dtype), _meta(2, dtype=dtype))
        triton.linear(x, order, counts, weight, bias, codes, exponent, bias, bits, variant, activations, True, True)

    several = [
        *itertools.product((64, 197, 1576, 12_608), ((768, 3072), (3072, 768)), (4,), ("ps",), ("bf16",), ("float",)),
        *itertools.product((197, 1576), ((75, 70),), (6,), ("q",), ("fp16",), ("float", "float8")),
        *itertools.product((197, 12_608), ((768, 3072),), (4,), ("ps",), ("bf16",), ("int8", "float8")),
        *itertools.product((64, 197, 12_608), ((768, 3072),), (4,), ("ps",), ("fp32",), ("float", "float8")),
        *itertools.product((197,), ((75, 70),), (6,), ("q",), ("fp32",), ("float",)),
    ]
    for tokens, (width, channels), bits, variant, name, activations in several:
        what = f"{activations}, {bits}-bit {variant}, {name}, ({tokens}, {width}, {channels})"
        quick = (tokens, width, name, activations) == (197, 768, "bf16", "float")
        call = _later(run, (tokens, width, channels), bits, variant, DTYPES[name], activations)
        # In float32 only rounded tokens go through tensor cores.
        exact = ("linear_kernel",) if (name, activations) == ("fp32", "float") else ()
        yield Case(what, call, quick, _those_with(activations, bits), (*plain, *exact))


def mixture_training() -> Iterator[Case]:
    """Both passes of an MLP's layers and of lone ones, in float32 without tensor cores and with TF32."""
    triton, derivative = gpu.kernels("experts.triton"), gpu.kernels("experts.triton_gradient")

    def run(shape: tuple[int, int, int], dtype: torch.dtype, tf32: bool, gather: bool, scatter: bool) -> None:
        tokens, width, channels = shape
        order, counts = (_meta(size, dtype=torch.int32) for size in (tokens, 2))
        x, grad = _meta(tokens, width, dtype=dtype), _meta(tokens, channels, dtype=dtype)
        weight, bias = _meta(channels, width, dtype=dtype), _meta(channels, dtype=dtype)
        across = _meta(width, channels, dtype=dtype)
        form = (4, "ps", "float")
        with _tf32(tf32):
            triton.linear(x, order, counts, weight, bias, weight, None, bias, *form, gather, scatter)
            triton.linear(grad, order, counts, across, None, across, None, None, *form, scatter, gather)
            for trained in (1, 2):
                derivative.gradient(grad, x, order, counts, gather, scatter, trained)

    several = [
        *itertools.product(((1576, 768, 3072), (12_608, 768, 3072)), ("bf16", "fp32", "tf32"), ((True, False),)),
        *itertools.product(((1576, 3072, 768), (12_608, 3072, 768)), ("bf16", "fp32", "tf32"), ((False, True),)),
        *itertools.product(((64, 192, 768), (12_608, 192, 768)), ("bf16", "fp16"), ((True, True),)),
        *itertools.product(((1576, 75, 70),), ("fp16", "fp32", "tf32"), ((True, False), (False, True))),
    ]
    for shape, name, (gather, scatter) in several:
        what = f"{name}, {shape}, {'gathered' * gather}{' and ' * (gather and scatter)}{'scattered' * scatter}"
        call = _later(run, shape, DTYPES[name.replace("tf", "fp")], name == "tf32", gather, scatter)
        plain = ("linear_kernel", "gradient_kernel") if name == "fp32" else ()
        yield Case(what, call, (shape[0], shape[1], name) == (12_608, 768, "bf16"), plain=plain)


# Every primitive with kernels. A new one stands here, and nowhere else.
PRIMITIVES: dict[str, Callable[[], Iterator[Case]]] = {
    "taylor": taylor,
    "hamming": hamming,
    "shift": shift,
    "mixture": mixture,
    "mixture_training": mixture_training,
}


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let float32 be multiplied as TF32, or as itself."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _later(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _those_with(activations: str, bits: int) -> tuple[int, ...]:
    """Return the architectures that have the format; without E4M3 the host code takes what it takes for 6 bits."""
    return (90, 100) if activations == "float8" and bits < 6 else ARCHITECTURES


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _qkv(width: int, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    """Return query, key and value as views of a packed projection of 64 images."""
    return _meta(64, tokens, 3, HEADS, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


def _known(launch: Launch) -> str:
    """Return what tells a launch's code apart from that of others of its kernel: constants, and what is missing."""
    kinds: list[Any] = [a.dtype if isinstance(a, Tensor) else a is None for a in launch.arguments]
    return f"{sorted(launch.keywords.items(), key=str)} {kinds}"
