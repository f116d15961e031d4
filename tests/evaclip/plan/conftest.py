import pytest

from evaclip.commands.main import main


@pytest.fixture
def plan(capsys):
    """`plan(*arguments)` is what `evaclip plan` prints."""

    def run(*arguments):
        assert main(["plan", *arguments]) == 0
        return capsys.readouterr().out

    return run
