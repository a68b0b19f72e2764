"""What masks cost the arrays, against simulations that place one entry at a time."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vitrify.accelerator.packing import load_balance, packed_rounds, polarise, sub_rows
from vitrify.errors import InputError

MASKS = arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40)))
ARRAYS = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))


def naive_rounds(mask, rows, columns, ports):
    """Fill the array entry by entry: a PE row serves one query until it is full, a pass serves one tile of keys."""
    passes = 0
    for head in mask.reshape(-1, *mask.shape[-2:]):
        for start in range(0, head.shape[1], ports):
            free_rows = 0
            for query in head[:, start : start + ports]:
                free_pes = 0
                for entry in query:
                    if not entry:
                        continue
                    if free_pes == 0:
                        if free_rows == 0:
                            passes, free_rows = passes + 1, rows
                        free_rows, free_pes = free_rows - 1, columns
                    free_pes -= 1
    return passes


@given(MASKS, ARRAYS)
@settings(max_examples=150, deadline=None)
def test_packing_is_filling_row_by_row(mask, array):
    rows, columns, ports = array
    rounds = packed_rounds(mask, rows, columns, ports)
    assert rounds == naive_rounds(mask, rows, columns, ports)
    assert rounds * rows * columns >= mask.sum()
    balance = load_balance(mask, rows, columns, ports)
    assert 0 < balance <= 1
    if mask.any():
        assert balance == mask.sum() / (rounds * rows * columns)


@given(MASKS, ARRAYS)
@settings(max_examples=50, deadline=None)
def test_keeping_more_or_having_fewer_rows_never_takes_fewer_passes(mask, array):
    rows, columns, ports = array
    rounds = packed_rounds(mask, rows, columns, ports)
    more = mask.copy()
    more[..., 0] = True
    assert packed_rounds(more, rows, columns, ports) >= rounds
    assert packed_rounds(mask, max(rows // 2, 1), columns, ports) >= rounds


def test_a_worked_example():
    """Two queries, a tile of 4 keys and one of 2; the second query keeps nothing of the second tile."""
    mask = np.array([[1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]], bool)
    assert sub_rows(mask, columns=2, ports=4).tolist() == [[2, 1], [1, 0]]
    assert packed_rounds(mask, rows=2, columns=2, ports=4) == 3  # three sub-rows on two rows, then one
    assert load_balance(mask, rows=2, columns=2, ports=4) == 5 / 12


def test_full_and_empty_masks():
    full = np.ones((2, 128, 128), bool)
    assert packed_rounds(full, 64, 16) == 2 * 2 * 128 * 4 // 64
    assert load_balance(full, 64, 16) == 1
    assert packed_rounds(~full, 64, 16) == 0
    assert load_balance(~full, 64, 16) == 1


@pytest.mark.parametrize("measure", [lambda m: packed_rounds(m, 64, 16), lambda m: polarise(m).sparser.sum()])
def test_deit_base_takes_less_than_a_third_of_a_second(measure):
    mask = np.random.default_rng(0).random((12, 12, 197, 197)) < 0.2
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        measure(mask)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


@given(MASKS, st.one_of(st.none(), st.integers(0, 20)))
@settings(max_examples=100, deadline=None)
def test_polarising_loses_nothing(mask, threshold):
    split = polarise(mask, threshold)
    limit = -(-mask.shape[-2] // 4) if threshold is None else threshold
    for head, tokens, rest, denser, sparser in zip(
        mask, split.global_tokens, split.rest, split.denser, split.sparser, strict=True
    ):
        dense = [column for column in range(head.shape[1]) if head[:, column].sum() > limit]
        others = np.delete(head, dense, axis=1)
        assert tokens == len(dense)
        assert rest.tolist() == others.sum(1).tolist()
        assert denser == len(dense) * head.shape[0]
        assert sparser + head[:, dense].sum() == head.sum()


def test_the_threshold_at_197_tokens_is_the_released_codes():
    mask = np.zeros((197, 197), bool)
    mask[:50, 0] = mask[:51, 1] = True
    assert polarise(mask).global_tokens == polarise(mask, 50).global_tokens == 1
    assert polarise(mask).rest.sum() == 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: packed_rounds(m, 0, 16), "at least one row of PEs, not 0"),
        (lambda m: packed_rounds(m, 4, 0), "at least one column and one port, not 0 and 64"),
        (lambda m: packed_rounds(m, 4, 4, 0), "at least one column and one port, not 4 and 0"),
        (
            lambda m: packed_rounds(m.astype(int), 4, 4),
            r"must be a bool array \(.*\), not int64 \(3, 3\)",
        ),
        (lambda m: packed_rounds(m[0], 4, 4), r"not bool \(3,\)"),
        (lambda m: polarise(m.tolist()), "not list"),
        (lambda m: polarise(m, -1), "threshold must be a number of queries, not -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(np.ones((3, 3), bool))
