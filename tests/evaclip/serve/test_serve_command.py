"""`evaclip serve` refuses what would let others in unasked, before anything is loaded."""

import pytest

from evaclip.commands.main import main
from evaclip.commands.serve import KEY_VARIABLE


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [
        (["--host", "0.0.0.0"], None, "lets other machines in, which needs a key"),
        (["--host", "example.com"], None, "lets other machines in, which needs a key"),
        ([], "short", "has 5 characters; expected 16 or more"),
        (["--host", "0.0.0.0"], "k" * 15 + "é", "expected 16 or more of ASCII"),
        (["--api-key-file", "nowhere"], None, "cannot read the key in nowhere"),
        (["--port", "70000"], None, "--port is 0 to 65535"),
        (["--delay", "-1"], None, "--delay 0 to 1000"),
        ([], None, "isn't a store"),
    ],
)
def test_mistakes_are_one_line(arguments, key, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    assert main(["serve", "a.store", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
