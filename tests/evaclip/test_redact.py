"""Credentials in published configurations."""

import pytest

from evaclip.redact import redacted


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pipe:curl -H 'Authorization: Bearer abc' https://h/{0..9}.tar | cat", "pipe:[redacted]"),
        ("a.tar::pipe:aws s3 cp s3://b/c.tar -", "a.tar::pipe:[redacted]"),
        ("https://me:p@ss@host:8080/a.tar", "https://host:8080/a.tar"),
        ("https://h/{00..09}.tar?sig=abc&e=1", "https://h/{00..09}.tar?[redacted]"),
        (
            "https://h/a.tar?sig=abc::https://h/b.tar#token=abc",
            "https://h/a.tar?[redacted]::https://h/b.tar?[redacted]",
        ),
        ("X-Api-Key: abc", "X-Api-Key: [redacted]"),
        ("hf_abcdefghijklmnopqrst", "[redacted]"),
        ("data/?.tar", "data/?.tar"),
        ("s3://bucket/{000..331}.tar", "s3://bucket/{000..331}.tar"),
        ("a photo of a {}", "a photo of a {}"),
    ],
)
def test_redacted_text(given: str, expected: str) -> None:
    assert redacted(given) == expected


def test_redacted_tree() -> None:
    tree = {"headers": {"A": "b"}, "hf_token": "abc", "token_dropout": 0.5, "use_token": True, "list": ["pipe:x", 1]}
    hidden = {"headers": "[redacted]", "hf_token": "[redacted]", "list": ["pipe:[redacted]", 1]}
    assert redacted(tree) == {**tree, **hidden}
