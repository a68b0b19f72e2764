"""The binarisers: codes, straight-through gradients, and that no image sees its neighbours."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from vitrify.errors import InputError, VitrifyError
from vitrify.nn import KSH, LearnedThreshold, TokenMean
from vitrify.nn.binarise import binarise
from vitrify.nn.kernel_hash import _agreement, _labels


def samples(images=6, heads=2, tokens=20, dim=8, *, seed=0, dtype=torch.float32):
    return torch.randn(images, heads, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(name, codes="binary", dtype=torch.float32):
    if name == "learned":
        binariser = LearnedThreshold(2, 8, codes, dtype=dtype)
        torch.nn.init.normal_(binariser.threshold, generator=torch.Generator().manual_seed(1))
    elif name == "token_mean":
        binariser = TokenMean(8, codes)
    else:
        binariser = KSH(2, 8, bits=5, anchors=7, codes=codes, dtype=dtype)
        binariser.load_state_dict(fitted_hash().state_dict())
    return binariser


@functools.cache
def fitted_hash():
    return refitted_hash()


def refitted_hash():
    hashing = KSH(2, 8, bits=5, anchors=7)
    hashing.fit_(samples(seed=2), samples(seed=3))
    return hashing


NAMES = ("learned", "token_mean", "ksh")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_codes_are_codes_in_the_dtype_of_x(name, dtype):
    x = samples(dtype=dtype)
    binary, sign = made(name, "binary", dtype)(x), made(name, "sign", dtype)(x)
    assert binary.dtype == sign.dtype == dtype
    assert binary.shape == (6, 2, 20, made(name).code_dim)
    assert set(binary.unique().tolist()) == {0, 1}
    assert torch.equal(sign, 2 * binary - 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_neighbours(name):
    binariser = made(name)
    x = samples()
    crowd = 5 + 3 * samples(seed=9)
    crowd[2] = x[2]
    for mode in (True, False):
        binariser.train(mode)
        assert torch.equal(binariser(x)[2], binariser(crowd)[2])
        assert torch.equal(binariser(x)[2:3], binariser(x[2:3]))


def test_thresholds():
    x = torch.tensor([[-2.0, 0.5, 1.0, 3.0]]).view(1, 1, 1, 4)
    learned = LearnedThreshold(1, 4, "sign")
    assert torch.equal(learned(x).flatten(), torch.tensor([-1.0, 1, 1, 1]))
    with torch.no_grad():
        learned.threshold.copy_(torch.tensor([[[-3.0, 1, 1, 2]]]))
    # At the threshold itself there is no bit.
    assert torch.equal(learned(x).flatten(), torch.tensor([1.0, -1, -1, 1]))
    assert torch.equal(TokenMean(4)(x).flatten(), torch.tensor([0.0, 0, 1, 1]))  # the mean is 0.625


@pytest.mark.parametrize(("codes", "slope"), [("binary", 0.5), ("sign", 1.0)])
def test_gradients_pass_within_one_of_the_threshold_only(codes, slope):
    x = torch.tensor([-3.0, -0.5, 0.2, 0.9, 1.3, 2.5], requires_grad=True)
    threshold = torch.tensor([0.1, 0.1, 0.1, -0.2, 0.4, 0.4], requires_grad=True)
    weights = torch.arange(1.0, 7.0)
    code = binarise(x, threshold, codes)
    assert torch.equal(code.detach(), binarise(x.detach(), threshold.detach(), codes))
    (code * weights).sum().backward()
    expected = weights * slope * torch.tensor([0.0, 1, 1, 0, 1, 0])
    assert torch.equal(x.grad, expected)
    assert torch.equal(threshold.grad, -expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_tokens(name):
    x = samples().requires_grad_()
    binariser = made(name)
    (binariser(x) * samples(dim=binariser.code_dim, seed=4)).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).float().mean() > 0.3


def test_thresholds_fit_the_keys_mean_and_leave_the_queries_at_0():
    query, key = samples() + 4, samples(seed=1) - torch.arange(8.0)
    of_query, of_key = made("learned"), made("learned")
    of_query.fit_(query, key, of_key)
    assert not of_query.threshold.any()
    torch.testing.assert_close(of_key.threshold[1, 0], key[:, 1].mean((0, 1)))
    assert abs(of_key(key).mean() - 0.5) < 0.05
    of_query.fit_(query, key)  # shared
    assert torch.equal(of_query.threshold, of_key.threshold)


def test_other_heads_or_channels_are_an_error():
    with pytest.raises(InputError, match=r"x \(6, 3, 20, 8\) does not fit thresholds .* \(2, 1, 8\)"):
        LearnedThreshold(2, 8)(samples(heads=3))
    with pytest.raises(InputError, match="num_heads and head_dim"):
        LearnedThreshold(2, 1)(samples())


@pytest.mark.parametrize(
    "make", [lambda c: LearnedThreshold(2, 8, c), lambda c: TokenMean(8, c), lambda c: KSH(2, 8, codes=c)]
)
def test_codes_are_named(make):
    with pytest.raises(InputError, match="unknown codes 'bin': did you mean 'binary'"):
        make("bin")


def test_multiplications():
    assert LearnedThreshold(2, 8).multiplications(100) == TokenMean(8).multiplications(100) == 0
    assert LearnedThreshold(2, 8).additions(100) == 800
    assert TokenMean(8).additions(100) == 1600
    # EcoFormer's 16 bits and 25 anchors at head_dim 32: 1200 per token.
    assert KSH(1, 32).multiplications(1) == 1200
    assert KSH(1, 32).multiplications(10) == 12000
    assert KSH(1, 32).additions(1) == 25 * 64 + 25 + 25 * 16 + 16


def test_hashing_must_be_fitted():
    hashing = KSH(2, 8)
    with pytest.raises(VitrifyError, match=r"not fitted: call calibrate_codes_\(model, images\)"):
        hashing(samples())
    hashing.load_state_dict(KSH(2, 8).state_dict())  # of another that is not fitted either
    with pytest.raises(VitrifyError, match="not fitted"):
        hashing(samples())


def test_a_fitted_hash_travels_in_the_state_dict_and_in_copies():
    fitted, x = made("ksh"), samples(seed=5)
    fresh = KSH(2, 8, bits=5, anchors=7)
    fresh.load_state_dict(fitted.state_dict())
    for other in (fresh, copy.deepcopy(fitted)):
        assert torch.equal(other(x), fitted(x))
    with torch.device("meta"):
        empty = KSH(2, 8, bits=5, anchors=7)
    empty.load_state_dict(fitted.state_dict(), assign=True)
    assert torch.equal(empty(x), fitted(x))


def test_hashing_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = refitted_hash(), refitted_hash()
    assert torch.rand(1) == expected
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_labels_are_the_ten_nearest_and_the_ten_farthest():
    query, key = samples(2, 1, 9), samples(2, 1, 30, seed=1)
    labels = _labels(query, key)
    order = (query @ key.mT).argsort(-1)
    for image in range(2):
        for i in range(9):
            assert (labels[image, 0, i, order[image, 0, i, -10:]] == 1).all()
            assert (labels[image, 0, i, order[image, 0, i, :10]] == -1).all()
    assert labels.abs().sum(-1).unique() == 20
    # With fewer than twenty keys, half and half.
    few = _labels(query, key[:, :, :5])
    assert few.abs().sum(-1).unique() == 4
    assert few.sum() == 0


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_hashed_codes_agree_for_similar_tokens(separate):
    """On held-out tokens: products of codes are larger for similar pairs than for dissimilar ones, by far."""
    mixing = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(7))

    def draw(seed):
        x = samples(tokens=40, seed=seed)
        return x, x @ mixing + 1  # keys are another function of the same tokens, off centre

    of_query = KSH(2, 8, codes="sign")
    of_key = KSH(2, 8, codes="sign") if separate else of_query
    of_query.fit_(*draw(1), of_key if separate else None)
    query, key = draw(2)
    products = of_query(query) @ of_key(key).mT
    labels = _labels(query, key)
    near, far = products[labels == 1].mean(), products[labels == -1].mean()
    assert near - far > (6 if separate else 4)


def test_a_bit_is_no_worse_than_chance():
    """The greedy fit weighs each new bit by what the bits before it left over."""
    query, key = samples(seed=2), samples(seed=3)
    hashing = KSH(2, 8, bits=5, anchors=7, codes="sign")
    hashing.fit_(query, key)
    residual = _labels(query, key).transpose(0, 1) * 5
    features = [hashing._features(x) for x in (query, key)]
    generator = torch.Generator().manual_seed(0)
    for bit in range(5):
        weight = hashing.weight[:, :, bit].unsqueeze(1)
        fitted = _agreement(*features, residual.contiguous(), weight)
        random = [
            _agreement(*features, residual.contiguous(), torch.randn(weight.shape, generator=generator))
            for _ in range(20)
        ]
        assert (fitted > torch.stack(random).amax(0)).all()
        codes = [hashing(x)[..., bit : bit + 1].transpose(0, 1) for x in (query, key)]
        residual = residual - codes[0] @ codes[1].mT


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        (samples(), samples()[:, :, :1], "two keys or more"),
        (samples(1, tokens=3), samples(1, tokens=3), "6 sampled tokens cannot give 7 anchors"),
        (samples() / 0, samples(), "NaN or infinities"),
    ],
)
def test_samples_that_hashing_cannot_fit(query, key, message):
    with pytest.raises(InputError, match=message):
        KSH(2, 8, bits=5, anchors=7).fit_(query, key)


def test_hashing_pairs_with_hashing():
    with pytest.raises(InputError, match="not by KSH and TokenMean"):
        KSH(2, 8).fit_(samples(), samples(), TokenMean(8))
    with pytest.raises(InputError, match="bits=0"):
        KSH(2, 8, bits=0)


def test_identical_tokens_do_not_give_nan():
    hashing = KSH(2, 8, bits=3, anchors=4)
    hashing.fit_(torch.ones(2, 2, 9, 8), torch.ones(2, 2, 9, 8))
    assert all(buffer.isfinite().all() for buffer in hashing.buffers())
    assert set(hashing(torch.ones(1, 2, 3, 8)).unique().tolist()) <= {0, 1}
