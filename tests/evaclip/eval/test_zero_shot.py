"""Class names, templates, and zero-shot classification by them."""

from pathlib import Path

import pytest
import torch

from evaclip.errors import UserError
from evaclip.eval.zero_shot import evaluate, load_classnames, load_templates


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("names.txt", "keycap: #\ncafé \n#\n\n", ("keycap: #", "café", "#")),
        ("bom.txt", "\ufeffcat\ndog\n", ("cat", "dog")),
        ("names.json", '["a", "b c"]', ("a", "b c")),
    ],
)
def test_load_classnames(tmp_path: Path, name: str, content: str, expected: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_classnames(tmp_path / name) == expected


def test_load_templates(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of {}\n{}, drawn\n")
    assert load_templates(file) == ("a photo of {}", "{}, drawn")
    assert load_templates("a sketch of {}") == ("a sketch of {}",)
    file.write_text("a photo of {}\na photo of {c}\n")
    with pytest.raises(UserError, match=r"line 2: template 'a photo of \{c\}' lacks the placeholder \{\}"):
        load_templates(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat\n\ndog\n", "a.txt, line 2"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", None, "No such file or directory; give a file"),
        ("a.json", b'["cat", 3]', "a.json, entry 2"),
        ("a.json", b'["cat",\n', "a.json must be valid JSON"),
    ],
)
def test_load_classnames_wrong_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_classnames(tmp_path / name)


def test_evaluate_counts_accuracies() -> None:
    # Class scores per image are the rows themselves.
    features = torch.tensor(
        [
            [0.9, 0.5, 0.4, 0.3, 0.2, 0.1],  # right at once
            [0.9, 0.5, 0.4, 0.3, 0.2, 0.1],  # label 4: fifth
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.9],  # label 0: last
            [0.9, 0.1, 0.1, 0.1, 0.1, 0.1],  # label 0
        ]
    )
    result = evaluate(features, torch.tensor([0, 4, 0, 0]), torch.eye(6), list("abcdef"))
    assert (result.top1, result.top5) == (0.5, 0.75)
    assert result.mean_per_class == pytest.approx((2 / 3 + 0) / 2)
    assert (result.chance_top1, result.chance_top5) == (1 / 6, 5 / 6)
    by_name = {entry.name: entry for entry in result.per_class}
    assert list(by_name) == ["a", "e"]
    assert (by_name["a"].samples, by_name["a"].mistaken_for) == (3, "f")
    assert (by_name["e"].top1, by_name["e"].top5, by_name["e"].mistaken_for) == (0.0, 1.0, "a")


def test_evaluate_tie_goes_to_lower_label() -> None:
    result = evaluate(torch.ones(4, 3), torch.arange(4), torch.ones(4, 3), list("abcd"))
    assert [entry.top1 for entry in result.per_class] == [1.0, 0.0, 0.0, 0.0]
    assert result.top1 == result.chance_top1
