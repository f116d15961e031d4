import pytest

from evaclip.errors import UserError
from evaclip.eval.labels import assign_labels


def test_captions_are_names() -> None:
    labels = assign_labels(["dog", "cat", "dog"], ["a", "b", "c"], ["cat", "dog", "eel"])
    assert labels.indices.tolist() == [1, 0, 1]
    assert labels.classnames == ("cat", "dog", "eel")


def test_captions_are_places_in_the_list() -> None:
    assert assign_labels(["2", "0"], ["a", "b"], ["cat", "dog", "eel"]).indices.tolist() == [2, 0]


def test_distinct_captions_are_the_classes_where_none_are_given() -> None:
    labels = assign_labels(["b", "a", "b"], list("xyz"))
    assert labels.classnames == ("a", "b")
    assert labels.indices.tolist() == [1, 0, 1]
    assert assign_labels(["10", "9"], list("xy")).classnames == ("9", "10")


def test_a_name_that_is_a_number_is_a_name() -> None:
    assert assign_labels(["1", "0"], list("xy"), ["1", "0"]).indices.tolist() == [0, 1]


@pytest.mark.parametrize("caption", ["1", "7"])
def test_numbers_that_are_names_are_no_places(caption: str) -> None:
    """Those of the pictures that k-NN learns from, say, where a class of the others is missing."""
    with pytest.raises(UserError, match=f"class of sample 'x': '{caption}'"):
        assign_labels([caption], ["x"], ["0", "2", "5"])


def test_folders_keep_their_classes_without_pictures() -> None:
    assert assign_labels(["b"], ["x"], None, ["a", "b"]).classnames == ("a", "b")


def test_folders_of_other_names_are_renamed_in_order() -> None:
    labels = assign_labels(["n02", "n01"], list("xy"), ["tench", "goldfish"], ["n01", "n02"])
    assert labels.indices.tolist() == [1, 0]
    assert labels.classnames == ("tench", "goldfish")
    by_name = assign_labels(["goldfish"], ["x"], ["tench", "shark", "goldfish"], ["goldfish"])
    assert by_name.indices.tolist() == [2]


def test_folders_that_are_numbers_are_labels() -> None:
    """Sorted as text, as folders are."""
    folders = sorted(map(str, range(12)))
    names = [f"class {number}" for number in range(12)]
    assert assign_labels(["10", "2"], list("xy"), names, folders).indices.tolist() == [10, 2]


def test_two_classes_of_one_name_stay_apart() -> None:
    crane = ["crane", "jay", "crane"]
    assert assign_labels(["2", "0"], list("xy"), crane).indices.tolist() == [2, 0]
    assert assign_labels(["n3", "n1"], list("xy"), crane, ["n1", "n2", "n3"]).indices.tolist() == [2, 0]
    with pytest.raises(UserError, match="several classes are called 'crane'"):
        assign_labels(["jay", "crane"], list("xy"), crane)


def test_wrong_labels_are_told() -> None:
    with pytest.raises(UserError, match=r"sample 'k7' has label 3, but the 3 classes are 0\.\.2"):
        assign_labels(["3"], ["k7"], ["cat", "dog", "eel"])
    with pytest.raises(UserError, match=r"sample 'k7'.*'dgo'; did you mean 'dog'"):
        assign_labels(["dgo"], ["k7"], ["cat", "dog", "eel"])
    with pytest.raises(UserError, match="3 class names for 2 folders"):
        assign_labels(["n01"], ["x"], ["a", "b", "c"], ["n01", "n02"])
