"""Tables of categories."""

import pytest

from groupdetr_fast.data.categories import class_table, difference_in_words

CALLED = ("this", "that")


def table(**names):
    """COCO's entries: category_3="car" is the category with the id 3."""
    return [{"id": int(key.removeprefix("category_")), "name": name} for key, name in names.items()]


def test_names_by_label():
    categories = table(category_1="cat", category_3="dog")
    assert class_table(categories, "contiguous") == (("cat", "dog"), (1, 3))
    assert class_table(categories, "category_id") == (("0", "cat", "2", "dog"), (0, 1, 2, 3))
    assert class_table([], "category_id") == ((), ())


def test_equal_tables_do_not_differ():
    first = table(category_1="person", category_3="car")
    assert difference_in_words(first, first[::-1], CALLED) is None
    assert difference_in_words([], [], CALLED) is None
    assert difference_in_words(first, [{**entry, "supercategory": "thing"} for entry in first], CALLED) is None


def test_a_category_in_one_alone_and_one_of_another_name():
    first, second = table(category_1="person", category_3="car"), table(category_1="people", category_3="car")
    assert difference_in_words(first, second, CALLED) == "category 1 is 'person' in this and 'people' in that"
    assert difference_in_words(first[:1], first, CALLED) == "category 3, 'car', is in that and not in this"
    assert difference_in_words(first, second[:1], CALLED) == (
        "category 1 is 'person' in this and 'people' in that; category 3, 'car', is in this and not in that"
    )


def test_few_are_told_and_long_names_cut():
    first = [{"id": number, "name": 1000 * "x"} for number in range(9)]
    told = difference_in_words(first, [], CALLED)
    assert told.count("category") == 3
    assert told.endswith(
        "category 2, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx', is in this and not in that; and 6 more"
    )
    assert difference_in_words(first, [{"id": number, "name": 1000 * "y"} for number in range(9)], CALLED).endswith(
        "and 6 more"
    )


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        (("y", "z"), (20 * "x" + "y", 20 * "x" + "z")),
        (("", "z"), (20 * "x", 20 * "x" + "z")),
        (("y" + 50 * "v", "z" + 50 * "v"), (20 * "x" + "y" + 19 * "v", 20 * "x" + "z" + 19 * "v")),
    ],
)
def test_long_names_are_cut_so_that_what_is_told_differs(ends, shown):
    first, second = (table(category_1=60 * "x" + end) for end in ends)
    expected = f"category 1 is '...{shown[0]}' in this and '...{shown[1]}' in that"
    assert difference_in_words(first, second, CALLED) == expected
    first, second = table(category_1=40 * "x"), table(category_1=41 * "x")
    expected = f"category 1 is '...{20 * 'x'}' in this and '...{21 * 'x'}' in that"
    assert difference_in_words(first, second, CALLED) == expected
