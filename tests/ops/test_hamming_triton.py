"""Runs the Triton kernels of Hamming attention in the interpreter, and checks which backend takes what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from taylor_inputs import padding

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops import gpu, hamming_attention
from vitrify.ops.hamming import Order, aten, bits, bytes_moved, pack_bits, threshold_bits, unpack_bits
from vitrify.ops.hamming.aten import Code

CASES = Path(__file__).with_name("hamming_triton_cases.py")


def run(*arguments, **environment):
    """Run Python in a process of its own: Triton decides at its import whether it interprets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_case_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0")
    result = run("-m", "pytest", *options, CASES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_importing_the_ops_does_not_import_triton():
    script = "import torch, sys; before = set(sys.modules); import vitrify.ops; print(set(sys.modules) - before)"
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    assert "vitrify.ops.hamming" in result.stdout
    assert "'triton" not in result.stdout
    assert "vitrify.ops.hamming.triton" not in result.stdout


def codes_and_value(dim=11, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randint(0, 2, (2, 3, n, dim), generator=generator).bool() for n in (9, 7))
    return query, key, torch.randn(2, 3, 7, 5, generator=generator).to(dtype)


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("codes", ["binary", "sign"])
def test_bits_hold_codes(dim, codes):
    code = codes_and_value(dim)[0]
    numbers = (2 * code.to(torch.int8) - 1) if codes == "sign" else code.to(torch.int8)
    packed = pack_bits(numbers)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 9, bits.words(dim))
    assert torch.equal(unpack_bits(packed, dim, codes, torch.int8), numbers)
    assert packed[0, 0, 0, 0] == sum(bool(b) << place for place, b in enumerate(code[0, 0, 0, :8].tolist()))


@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("codes", ["binary", "sign"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_bits_are_codes_on_every_device(order: Order, codes, masked):
    query, key, value = codes_and_value()
    mask = padding(2, 7) if masked else None
    numbers = [2 * t.to(torch.int8) - 1 if codes == "sign" else t for t in (query, key)]
    expected = hamming_attention(*numbers, value, mask, order=order)
    packed = [pack_bits(t) for t in (query, key)]
    assert torch.equal(hamming_attention(*packed, value, mask, order=order, code_dim=11, codes=codes), expected)
    mixed = hamming_attention(packed[0], numbers[1], value, mask, order=order, code_dim=11, codes=codes)
    assert torch.equal(mixed, expected)


def test_threshold_bits_are_the_binarised_numbers():
    x = torch.randint(-2, 3, (2, 3, 9, 11)).float()
    for threshold in (torch.randint(-1, 2, (3, 1, 11)).float(), x.mean(-1, keepdim=True), torch.zeros(())):
        assert torch.equal(threshold_bits(x, threshold), pack_bits(x > threshold))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (hamming_attention, "query_code is uint8, which holds bits: say with code_dim"),
        (lambda q, k, v: hamming_attention(q, k, v, code_dim=17), r"must have 3 bytes per token for code_dim=17"),
        (
            lambda q, k, v: hamming_attention(q, k, v, code_dim=11, codes="sgn"),
            "unknown codes 'sgn'",
        ),
        (lambda q, k, v: hamming_attention(q, k[..., :1], v, code_dim=11), "key_code .* must have 2 bytes per token"),
        (lambda q, k, v: hamming_attention(q, k, v, code_dim=11, backend="tritn"), "did you mean 'triton'"),
        (
            lambda q, k, v: hamming_attention(q, k, v, code_dim=11, backend="triton"),
            "takes the linear order,.* on cpu",
        ),
        (lambda q, k, v: threshold_bits(v, v[:, :, :, :4]), r"threshold \(2, 3, 7, 4\) does not broadcast"),
        (lambda q, k, v: threshold_bits(v[0], v[0]), r"x must be \(batch, heads, tokens, channels\), not of shape"),
        (lambda q, k, v: threshold_bits(v, v.to("meta")), "threshold is on meta but x is on cpu"),
        (lambda q, k, v: bytes_moved("bit", 1, 1, 1, 1, 1), "unknown way to store codes 'bit': did you mean 'bits'"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    query, key, value = codes_and_value()
    with pytest.raises(InputError, match=message):
        call(pack_bits(query), pack_bits(key), value)


@pytest.mark.parametrize("stored", ["bits", "bool", "numbers"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_opcheck(stored, masked):
    query, key, value = codes_and_value()
    keep = padding(2, 7)[:, 0, 0] if masked else None
    coded = {
        "bits": [pack_bits(t) for t in (query, key)],
        "bool": [query, key],
        "numbers": [t.float().requires_grad_() for t in (query, key)],
    }[stored]
    arguments = (*coded, value.requires_grad_(), keep, 11, False, torch.float64)
    torch.library.opcheck(torch.ops.vitrify.hamming_attention.default, arguments)
    out, matrices = torch.ops.vitrify.hamming_attention(*arguments)
    grad = torch.randn_like(out)
    backward = (grad, *(t.detach() for t in (*coded, value)), keep, matrices.detach(), 11, False)
    torch.library.opcheck(torch.ops.vitrify.hamming_attention_backward.default, backward)


def test_opcheck_threshold_bits():
    torch.library.opcheck(torch.ops.vitrify.threshold_bits.default, (torch.randn(2, 3, 9, 11), torch.randn(3, 1, 11)))


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_the_op_has_the_gradients_of_plain_pytorch(masked):
    query, key, value = (t.double().requires_grad_() for t in codes_and_value())
    keep = padding(2, 7)[:, 0, 0] if masked else None

    def op(*tensors):
        return torch.ops.vitrify.hamming_attention(*tensors, keep, 11, False, torch.float64)[0]

    assert torch.autograd.gradcheck(op, (query, key, value))
    (found,) = torch.autograd.grad(op(query, key, value).square().sum(), (value,), create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative: backend='aten' has"):
        found.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda *t: aten.sums(*t, keep, Code(11, signed=False), "linear"), (query, key, value)
    )


class Packs(torch.nn.Module):
    def forward(self, x, threshold):
        code = threshold_bits(x, threshold)
        return hamming_attention(code, code, x, code_dim=x.shape[3])


def test_compiles_whole_and_exports_plain_aten():
    x, threshold = torch.randn(2, 3, 9, 11), torch.randn(3, 1, 11)
    expected = Packs()(x, threshold)
    compiled = torch.compile(Packs(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, threshold), expected)
    tokens = {2: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(Packs(), (x, threshold), dynamic_shapes=(tokens, None))
    assert not any("vitrify" in str(node.target) for node in program.graph.nodes)
    longer = torch.randn(2, 3, 30, 11)
    torch.testing.assert_close(program.module()(longer, threshold), Packs()(longer, threshold))


@pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') == '1'", reason="the interpreter records nothing")
def test_no_kernel_gets_the_gradient_of_a_float64_result():
    """Triton has no product of it with float32, whatever the interpreter makes of one."""
    ahead_of_time = pytest.importorskip("vitrify.ops.ahead_of_time", reason="Triton is not installed")
    triton = gpu.kernels("hamming.triton")
    code, value, matrices = (torch.empty(1, 2, n, 16, device="meta") for n in (197, 197, 16))
    with ahead_of_time.recorded_launches() as launches:
        grads = triton.backward(value.double(), code, code, value, None, matrices, Code(16, signed=False))
    assert {launch.name for launch in launches} >= {"gram_kernel", "apply_kernel", "stream_kernel"}
    given = [x for launch in launches for x in launch.arguments if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in (*given, *grads)} == {torch.float32}


@pytest.mark.parametrize(
    ("stored", "binarised", "expected"),
    [
        ("sdpa", False, 4 * 197 * 128),
        ("bfloat16", False, 4 * 197 * 128),
        ("int8", False, 2 * 197 * (64 + 128)),
        ("bits", False, 2 * 197 * (8 + 128)),
        ("sdpa", True, 4 * 197 * 128),
        ("bits", True, 2 * 197 * (8 + 128 + 128 + 8)),
    ],
)
def test_bytes_moved(stored, binarised, expected):
    assert bytes_moved(stored, 12, 197, 197, 64, 64, binarised=binarised) == 12 * expected


def test_the_readme_prints_what_bytes_moved_returns():
    text = Path(bits.__file__).with_name("README.md").read_text()
    table = [
        row.split("|")[2:5] for row in text.splitlines() if row.startswith(("| queries and keys as", "| codes as"))
    ]
    found = [[float(figure) for figure in row] for row in table]
    stored = (("sdpa", False), ("int8", False), ("bits", False), ("bits", True))
    assert found == [
        [round(bytes_moved(how, 12, n, n, 64, 64, binarised=made) / 1e6, 2) for n in (197, 1024, 4096)]
        for how, made in stored
    ]
