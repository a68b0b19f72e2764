"""Fixed-point Taylor attention against float64: within what its roundings can add up to, for any shape and tiling."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from taylor_inputs import qkv

from vitrify.errors import InputError
from vitrify.ops.fixed_point import limits, product
from vitrify.ops.taylor import reference
from vitrify.ops.taylor.quantised import SCHEDULES, Affine, Algorithm1
from vitrify.ops.taylor.widths import Ranges, Widths

WIDE = Widths(context=16, partial=32)
SHAPES = st.tuples(*[st.integers(1, high) for high in (2, 3, 40, 40, 17, 17)])
# What an unsigned multiplier of 16 bits leaves of a factor.
FACTOR = 2.0**-16


def prepared(name, shape, widths, *, seed=0, offset=0.0):
    """Return the schedule for such inputs, their codes, and as real numbers what the codes stand for."""
    inputs = qkv(*shape, seed=seed, offset=offset)
    scale = shape[4] ** -0.5
    schedule = SCHEDULES[name].of(Ranges.of(*inputs, scale), shape[3], scale, widths)
    codes = schedule.quantise(*inputs)
    units = (schedule.units.query, schedule.units.key, schedule.units.value)
    return schedule, codes, [code * unit for code, unit in zip(codes, units, strict=True)], scale


def unit_of_context(schedule, scale):
    """Return the real value of one unit of G or M, from the constants alone."""
    units = schedule.units
    factor = schedule.to_context.multiplier / 2.0**schedule.to_context.shift
    if isinstance(schedule, Algorithm1):
        return units.centred_key * units.value / factor
    return units.centred_key * units.centred_value * scale / schedule.tokens / factor


def off(schedule, unit, shift):
    """Return the most that rounding moves all centred keys (or values) of a channel by, and the mean's own share."""
    largest = limits(schedule.widths.activations)[1]
    mean = unit * (2.0 ** -(schedule.widths.fraction + 1) + FACTOR * largest)
    return mean + unit * 2.0**-shift / 2, mean


def affine_bound(schedule, query, key, value, scale):
    """Return the most that means, M, vbar and Z lose by rounding, for each output."""
    _, state = reference.affine(query, key, value, None, scale)
    units, unit = schedule.units, unit_of_context(schedule, scale)
    (off_key, _), (off_value, of_mean) = (
        off(schedule, units.key, units.key_shift),
        off(schedule, units.value, units.value_shift),
    )
    # sum_j (k^_j + e)(v^_j + e') = sum_j k^_j v^_j + n e e', as the centred ones sum to 0.
    context = query.abs() @ (unit / 2 + scale * off_key * off_value + FACTOR * state.M.abs())
    start = units.query * unit / 2 + of_mean + FACTOR * state.vbar.abs()
    applied = state.vbar.abs() + query.abs() @ state.M.abs() + context + start
    return context + start + units.output / 2 + 2 * FACTOR * applied


def algorithm1_bound(schedule, query, key, value, scale):
    """Return the most that the six steps lose, each output's weights being those of slightly other keys."""
    n, units, unit = schedule.tokens, schedule.units, unit_of_context(schedule, scale)
    out = reference.algorithm1(query, key, value, None, scale)
    centred = key - key.mean(-2, keepdim=True)
    off_key, _ = off(schedule, units.key, units.key_shift)
    weights = query.abs().sum(-1, keepdim=True) * n * off_key
    context_error = query.abs() @ (unit / 2 + FACTOR * (centred.abs() + off_key).mT @ value.abs())
    start_error = units.query * unit / 2 + FACTOR * value.sum(-2, keepdim=True).abs() / scale
    denominator_error = n / scale / schedule.constant + FACTOR * weights
    # n (q . e) (vbar - Z), e what the keys are off by: it moves numerator and denominator at once.
    moved = weights * (value.mean(-2, keepdim=True) - out).abs()
    dividend_error = 0.5 * 2.0 ** max(0, -schedule.dividend_shift) * units.query * unit
    numerator_error = moved + context_error + start_error + dividend_error + out.abs() * denominator_error
    total = (n / scale - weights - denominator_error).clamp_min(0)
    return numerator_error / total + units.output / 2 + 2 * FACTOR * out.abs()


def saturates(schedule, query, key, value):
    """Say whether codes of k^, v^, G or M lie at their end: ranges come from the numbers before these were rounded."""
    centred = [schedule.centre_key(key, schedule.mean(key.sum(-2, keepdim=True)))]
    if isinstance(schedule, Affine):
        value = schedule.centre_value(value, schedule.mean(value.sum(-2, keepdim=True)))
        centred.append(value)
    context = schedule.context(centred[0].mT @ value)
    ends = [limits(schedule.widths.activations)[1]] * len(centred) + [limits(schedule.widths.context)[1]]
    return any(int(codes.abs().max()) >= end for codes, end in zip([*centred, context], ends, strict=True))


BOUNDS = {"algorithm1": algorithm1_bound, "affine": affine_bound}


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1.0, 4.0]), wide=st.booleans())
def test_error_stays_within_what_roundings_can_add_up_to(name, shape, seed, offset, wide):
    schedule, codes, real, scale = prepared(name, shape, WIDE if wide else Widths(), seed=seed, offset=offset)
    low, high = limits(8)
    assume(not saturates(schedule, *codes))
    out = schedule(*codes)
    truth = reference.algorithm1(*real, None, scale)
    bound = BOUNDS[name](schedule, *real, scale)
    inside = (truth.abs() + bound) / schedule.units.output < high
    error = (out * schedule.units.output - truth).abs()
    assert bool((error <= bound)[inside].all()), float((error / bound)[inside].max())
    assert out.dtype == torch.int64
    assert low <= int(out.min()) <= int(out.max()) <= high


def test_the_bounds_are_not_idle():
    """On a plain case they allow a few units: a wrong step (no centring, no v_sum) is far outside."""
    shape = (1, 2, 65, 65, 16, 16)
    for name, bound in BOUNDS.items():
        schedule, codes, real, scale = prepared(name, shape, WIDE)
        allowed = bound(schedule, *real, scale) / schedule.units.output
        assert float(allowed.median()) < (20 if name == "algorithm1" else 1.5)
        wrong = schedule(codes[0], codes[1].roll(1, 2), codes[2])
        truth = reference.algorithm1(*real, None, scale) / schedule.units.output
        assert float(((wrong - truth).abs() > allowed).float().mean()) > 0.3


def error_in_units(name, widths, shape=(2, 3, 197, 197, 64, 64), **options):
    """Return the root mean square error of Z, in units of its last digit; rounding alone makes 0.289 of one."""
    schedule, codes, real, scale = prepared(name, shape, widths, **options)
    truth = reference.algorithm1(*real, None, scale) / schedule.units.output
    return float((schedule(*codes) - truth).square().mean().sqrt())


def test_the_affine_form_is_the_more_precise_one():
    for seed in range(3):
        plain, ours = (error_in_units(name, Widths(), seed=seed) for name in ("algorithm1", "affine"))
        assert ours < 0.9 * plain
        # With a context of 16 bits nothing is left but the rounding of the result itself.
        assert error_in_units("affine", WIDE, seed=seed) == pytest.approx(12**-0.5, rel=0.03)
        assert error_in_units("algorithm1", WIDE, seed=seed) > 1.1 * 12**-0.5


def test_rounded_centred_keys_do_not_sum_to_zero():
    """All keys of a channel round the same way: the sum is n times what the rounded mean is off by."""
    schedule, (_, key, _), _, _ = prepared("algorithm1", (2, 3, 1000, 1000, 64, 64), Widths())
    key = key.clamp(-120, 120)  # nothing saturates
    centred = schedule.centre_key(key, schedule.mean(key.sum(-2, keepdim=True)))
    sums = centred.sum(-2)
    assert (sums != 0).float().mean() > 0.95
    assert int(sums.abs().max()) <= 500
    # Even from -n/2 to n/2.
    assert float(sums.double().square().mean()) == pytest.approx(1000**2 / 12, rel=0.15)
    assert torch.equal(schedule.key_operand(sums), sums)


def test_without_k_sum_the_denominators_would_be_wrong():
    """The sum that is 0 in real numbers has to be carried: 0 in its place costs precision."""
    shape = (2, 3, 197, 197, 64, 64)
    schedule, codes, real, scale = prepared("algorithm1", shape, Widths(), offset=2.0)

    class Without(Algorithm1):
        def key_operand(self, centred_sum):
            return torch.zeros_like(centred_sum)

    truth = reference.algorithm1(*real, None, scale) / schedule.units.output
    carried, dropped = (s(*codes) - truth for s in (schedule, Without(**vars(schedule))))
    assert dropped.square().mean() > 1.5 * carried.square().mean()


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("name", SCHEDULES)
def test_tiles_in_any_order_give_the_same_bits(name, shape, seed, data):
    schedule, (query, key, value), _, _ = prepared(name, shape, Widths(), seed=seed)
    partial = schedule.widths.partial

    def summed(a, b):
        """A product whose inner dimension comes in random pieces, in a random order."""
        tokens = a.shape[-1]
        ends = sorted(data.draw(st.sets(st.integers(1, tokens), max_size=4)) | {tokens})
        pieces = data.draw(st.permutations(list(zip([0, *ends], ends, strict=False))))
        return sum(product(a[..., low:high], b[..., low:high, :], partial, "piece") for low, high in pieces)

    def rows(function, tokens):
        """What a step gives for each row by itself."""
        return torch.cat([function(slice(row, row + 1)) for row in range(tokens)], -2)

    key_sum, value_sum = key.sum(-2, keepdim=True), value.sum(-2, keepdim=True)
    if isinstance(schedule, Affine):
        mean, value_mean = schedule.mean(key_sum), schedule.mean(value_sum)
        centred = rows(lambda row: schedule.centre_key(key[..., row, :], mean), key.shape[2])
        values = rows(lambda row: schedule.centre_value(value[..., row, :], value_mean), key.shape[2])
        context = schedule.context(summed(centred.mT, values))
        applied = schedule.start(value_mean) + summed(query, context)
        out = rows(lambda row: schedule.score(applied[..., row, :]), query.shape[2])
    else:
        mean = schedule.mean(key_sum)
        centred = rows(lambda row: schedule.centre_key(key[..., row, :], mean), key.shape[2])
        context = schedule.context(summed(centred.mT, value))
        operand = schedule.key_operand(centred.sum(-2, keepdim=True))
        denominator = schedule.denominator(summed(query, operand.mT))
        applied = schedule.start(value_sum) + summed(query, context)
        out = rows(lambda row: schedule.score(applied[..., row, :], denominator[..., row, :]), query.shape[2])
    assert torch.equal(out, schedule(query, key, value))


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_exceeds_the_calibrated_ranges_saturates(name):
    """Ten times the values: the result is held at the end of its codes where it would be larger."""
    shape = (1, 1, 32, 32, 8, 8)
    scale = 8**-0.5
    query, key, value = qkv(*shape)
    schedule = SCHEDULES[name].of(Ranges.of(query, key, value, scale), 32, scale, Widths())
    assert schedule.quantise(10 * query, key, value)[0].aminmax() == (-128, 127)
    narrow = SCHEDULES[name].of(Ranges.of(query, key, value / 10, scale), 32, scale, Widths())
    out = narrow(*narrow.quantise(query, key, value))
    assert out.aminmax() == (-128, 127)
    truth = reference.algorithm1(query, key, value, None, scale)
    assert torch.equal(out[truth > 4].sign(), torch.ones_like(out[truth > 4]))


def test_denominators_never_reach_zero():
    schedule, _, _, _ = prepared("algorithm1", (1, 1, 9, 9, 4, 4), Widths())
    far = torch.tensor([[[[-(2**23)], [2**23 - 1]]]])
    assert schedule.denominator(far).flatten().tolist() == [1, 2**16 - 1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_sum_too_wide_for_its_accumulator_raises(name):
    ones = torch.ones(1, 1, 600, 4, dtype=torch.float64)
    schedule = SCHEDULES[name].of(Ranges(1, 1, 1, 1, 1, 600, 1), 600, 0.5, Widths(partial=24))
    codes = schedule.quantise(ones, torch.cat([ones[:, :, :300], -ones[:, :, 300:]], 2), ones)
    schedule(*codes)
    narrow = SCHEDULES[name].of(Ranges(1, 1, 1, 1, 1, 600, 1), 600, 0.5, Widths(partial=16))
    with pytest.raises(InputError, match=r"reaches \d\d bits, but partial sums have 16"):
        narrow(*codes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zeros_and_single_keys_are_no_special_case(name):
    zeros = torch.zeros(1, 2, 5, 4, dtype=torch.float64)
    schedule = SCHEDULES[name].of(Ranges.of(zeros, zeros, zeros, 0.5), 5, 0.5, Widths())
    assert schedule(*schedule.quantise(zeros, zeros, zeros)).eq(0).all()
    schedule, codes, real, _ = prepared(name, (1, 1, 4, 1, 3, 3), Widths())
    truth = real[2].expand(-1, -1, 4, -1) / schedule.units.output  # one key: attention gives its value
    assert (schedule(*codes) - truth).abs().max() <= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_other_inputs_are_refused_by_name(name):
    schedule, (query, key, value), _, _ = prepared(name, (1, 1, 6, 6, 4, 4), Widths())
    with pytest.raises(InputError, match="query must hold integers"):
        schedule(query.double(), key, value)
    with pytest.raises(InputError, match="value must be codes from -128 to 127"):
        schedule(query, key, value + 300)
    with pytest.raises(InputError, match="5 keys and 5 values, but the schedule is for 6"):
        schedule(query, key[:, :, 1:], value[:, :, 1:])


def test_widths_and_ranges_are_checked():
    with pytest.raises(InputError, match="context must be an integer from 2 to 16 bits, not 32"):
        Widths(context=32)
    with pytest.raises(InputError, match="fraction must be an integer from 0"):
        Widths(fraction=-1)
    with pytest.raises(InputError, match="must be finite"):
        Ranges.of(*(torch.full((1, 1, 2, 2), math.nan) for _ in range(3)), 0.5)
    ranges = Ranges(1, 5, 1, 1, 1, 1, 1) | Ranges(2, 1, 1, 1, 1, 1, 3)
    assert ranges == Ranges(2, 5, 1, 1, 1, 1, 3)
