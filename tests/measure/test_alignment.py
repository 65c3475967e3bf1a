from fxroof.analyzer.alignment import aligned


def test_equal_sequences_are_each_other() -> None:
    assert aligned("abcabc", "abcabc") == [0, 1, 2, 3, 4, 5]


def test_what_was_added_has_no_place_and_the_rest_keeps_its_own() -> None:
    assert aligned("abcdefgh", "abXcdefgh") == [0, 1, None, 2, 3, 4, 5, 6, 7]


def test_what_is_missing_is_passed_over() -> None:
    assert aligned("abcdefgh", "abdefgh") == [0, 1, 3, 4, 5, 6, 7]


def test_what_was_replaced_is_missing_and_added() -> None:
    assert aligned("abcdefgh", "abXYdefgh") == [0, 1, None, None, 3, 4, 5, 6, 7]


def test_repeated_layers_do_not_pull_places_forward() -> None:
    layer = "qkvso"
    assert aligned(layer * 6, "!" + layer * 6) == [None, *range(30)]


def test_differences_at_both_ends() -> None:
    assert aligned("abcdef", "Xabcdef") == [None, 0, 1, 2, 3, 4, 5]
    assert aligned("abcdef", "abcdefX") == [0, 1, 2, 3, 4, 5, None]
    assert aligned("abcdefX", "abcdef") == [0, 1, 2, 3, 4, 5]
    assert aligned("", "ab") == [None, None]
    assert aligned("ab", "") == []


def test_places_only_grow() -> None:
    places = [p for p in aligned("abcabcabdabcabe" * 8, "abcabdabcabeabc" * 8) if p is not None]
    assert places == sorted(set(places))
