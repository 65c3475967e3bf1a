"""The caches between kernels, against a cache simulated line by line and the best policy found by trying them all."""

import functools

import pytest
from fxroof.analyzer.l2 import Touch, fold, kept_at_best, kept_by_reuse
from hypothesis import given, settings
from hypothesis import strategies as st

Sequence = list[list[Touch]]


def kinds_of(sequence: Sequence) -> list[int]:
    names: dict[object, int] = {}
    return [names.setdefault(tuple((t.read, t.written) for t in touches), len(names)) for touches in sequence]


def best(sequence: Sequence, capacity: int) -> float:
    """Bytes that the ideal cache keeps within a step, what is kept from step to step left out."""
    fold_ = fold(sequence, kinds_of(sequence))
    useful = [True] * len(fold_.kept)
    kept = kept_at_best(fold_, capacity, useful)
    nothing = kept_at_best(fold_, 0, useful)
    between = min(capacity, _compulsory(sequence))
    assert sum(k.read + k.written for k in nothing) == 0
    return sum(kept[i].read + kept[i].written for i in fold_.source) - between


def _compulsory(sequence: Sequence) -> int:
    seen: set[int] = set()
    first = 0
    for touches in sequence:
        for t in touches:
            first += t.read if t.buffer not in seen else 0
            seen.add(t.buffer)
    last = {t.buffer: i for i, touches in enumerate(sequence) for t in touches}
    return first + sum(t.written for i, touches in enumerate(sequence) for t in touches if last[t.buffer] == i)


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """A few kernels over a few buffers of one size each: read what is there, write what is new."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    made: set[int] = set()
    sequence: Sequence = []
    for _ in range(draw(st.integers(2, 6))):
        touched = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=2, unique=True))
        touches = []
        for buffer in touched:
            fresh = buffer not in made and draw(st.booleans())
            touches.append(Touch(buffer, 0 if fresh else sizes[buffer], sizes[buffer] if fresh else 0))
            made.add(buffer)
        sequence.append(touches)
    return sequence


def tried(sequence: Sequence, capacity: int) -> int:
    """The most bytes that any choice of lines to keep spares, reads and write-backs of results that are read again.

    Each byte is a line; a state is the set of lines in the cache with those that were never written back.
    """
    lines = [(t.buffer, n) for touches in sequence for t in touches for n in range(max(t.read, t.written))]
    lines = list(dict.fromkeys(lines))
    last = {b: i for i, touches in enumerate(sequence) for t in touches for b in [t.buffer]}

    @functools.cache
    def most(step: int, state: frozenset[tuple[tuple[int, int], bool]]) -> int:
        if step == len(sequence):
            return 0
        held = dict(state)
        spared = 0
        for t in sequence[step]:
            for n in range(max(t.read, t.written)):
                line = (t.buffer, n)
                if t.written:
                    held[line] = True
                else:
                    spared += line in held
                    if line in held and held[line] and last[t.buffer] == step:
                        spared += 1  # read for the last time and never written back
                        held[line] = False
                    held.setdefault(line, False)
        live = [(line, dirty) for line, dirty in held.items() if last[line[0]] > step]
        return spared + max(most(step + 1, frozenset(choice)) for choice in _choices(live, capacity))

    return most(0, frozenset())


def _choices(
    lines: list[tuple[tuple[int, int], bool]], capacity: int
) -> list[tuple[tuple[tuple[int, int], bool], ...]]:
    # lines of a buffer are alike: how many of each are kept is what matters
    by_buffer: dict[int, list[tuple[tuple[int, int], bool]]] = {}
    for line in sorted(lines):
        by_buffer.setdefault(line[0][0], []).append(line)
    choices: list[tuple[tuple[tuple[int, int], bool], ...]] = [()]
    for group in by_buffer.values():
        choices = [c + tuple(group[:n]) for c in choices for n in range(len(group) + 1)]
    return [c for c in choices if len(c) <= capacity]


@settings(max_examples=150, deadline=None)
@given(sequence=sequences(), capacity=st.integers(1, 6))
def test_no_choice_of_lines_spares_more_than_the_ideal_cache(sequence: Sequence, capacity: int) -> None:
    assert tried(sequence, capacity) <= best(sequence, capacity) + 1e-9


@settings(max_examples=100, deadline=None)
@given(sequence=sequences(), capacity=st.integers(1, 6))
def test_lru_spares_no_more_than_the_ideal_cache(sequence: Sequence, capacity: int) -> None:
    fold_ = fold(sequence, kinds_of(sequence))
    if fold_.footprint > capacity:
        kept = kept_by_reuse(fold_, capacity)
        assert sum(kept[i].read + kept[i].written for i in fold_.source) <= best(sequence, capacity) + 1e-9


@settings(max_examples=100, deadline=None)
@given(sequence=sequences(), capacity=st.integers(1, 8))
def test_whole_buffers_are_found_where_a_simulated_lru_finds_all_their_lines(sequence: Sequence, capacity: int) -> None:
    fold_ = fold(sequence, kinds_of(sequence))
    if fold_.footprint <= capacity:
        return
    stack: list[tuple[int, int]] = []
    for index, touches in enumerate(sequence):
        found = 0
        lines = [(t.buffer, n) for t in touches for n in range(max(t.read, t.written))]
        distance = {line: len(stack) - stack.index(line) for line in lines if line in stack}
        for t in touches:
            own = [(t.buffer, n) for n in range(t.read)]
            # found as a whole where all that was touched since, and itself, fit
            if own and all(line in distance for line in own):
                found += t.read if max(distance[line] for line in own) <= capacity else 0
        stack = [line for line in stack if line not in lines] + lines
        kept = kept_by_reuse(fold_, capacity)[fold_.source[index]]
        assert kept.read >= found - 1e-9


@pytest.mark.parametrize("layers", [6, 40])
@pytest.mark.parametrize("capacity", [3, 10, 25])
def test_folding_a_run_of_layers_changes_nothing(layers: int, capacity: int) -> None:
    # a residual stream, a scratch result of each layer, weights of each layer, and a table that all share
    sequence: Sequence = [[Touch(0, 0, 4), Touch(1, 2, 0)]]
    for layer in range(layers):
        weight, made = 100 + layer, 1000 + layer
        sequence.append([Touch(0, 4, 0), Touch(weight, 9, 0), Touch(made, 0, 3)])
        sequence.append([Touch(made, 3, 0), Touch(1, 2, 0), Touch(0, 4, 4)])
    sequence.append([Touch(0, 4, 0), Touch(2, 5, 0), Touch(3, 0, 1)])
    short, whole = fold(sequence, kinds_of(sequence)), fold(sequence, list(range(len(sequence))))
    assert len(short.kept) < len(sequence) or layers < 8
    assert len(whole.kept) == len(sequence)
    for kept in (lambda f: kept_at_best(f, capacity, [True] * len(f.kept)), lambda f: kept_by_reuse(f, capacity)):
        one, other = kept(short), kept(whole)
        for index in range(len(sequence)):
            found = one[short.source[index]]
            assert found.read == pytest.approx(other[index].read)
            assert found.written == pytest.approx(other[index].written)


def test_what_a_cache_held_before_the_step_is_found_beside_the_rows_that_the_step_wrote() -> None:
    sequence = [[Touch(0, 0, 2, lasting=True)], [Touch(0, 10, 0, lasting=True)]]
    write, read = kept_at_best(fold(sequence, [0, 1]), 12, [True, True])
    assert (write.written, read.read) == (2, 10)
    write, read = kept_at_best(fold(sequence, [0, 1]), 6, [True, True])
    assert write.written + read.read == 2 + 6, "the rows from kernel to kernel, six bytes from step to step"


def test_a_kernel_repeated_on_the_same_buffers_moves_its_footprint_less_the_cache() -> None:
    sequence = [[Touch(0, 70, 0, lasting=True), Touch(1, 0, 50, lasting=True)]]
    fold_ = fold(sequence, [0])
    (kept,) = kept_at_best(fold_, 50, [True])
    assert kept.read + kept.written == pytest.approx(50)
