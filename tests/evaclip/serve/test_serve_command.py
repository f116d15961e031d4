"""`evaclip serve` refuses what would let others in unasked, before anything is loaded; opens the browser if asked."""

import os
import signal
import socket
from threading import Thread, Timer
from urllib.request import urlopen

import pytest

from evaclip.commands.main import main
from evaclip.commands.serve import KEY_VARIABLE, _tell
from evaclip.serve import create_app


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


def test_port_in_use_is_refused_first(store, capsys, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr("evaclip.runtime.encoder.Encoder", lambda *args, **kwargs: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(store.folder), "--port", str(port)]) == 2
    assert f"error: cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("found", [True, False])
def test_the_browser_is_opened_once_the_page_is_there(found, store, encoder, capsys, monkeypatch):
    shown = []

    def browse(address):
        try:
            with urlopen(address) as page:
                shown.append((address, page.read()))
        finally:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr("evaclip.commands.serve._app", lambda *args: create_app(store, encoder))
    monkeypatch.setattr("webbrowser.open", browse)
    # Where nobody could press Ctrl-C, processes are started to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    unasked = Timer(60, os.kill, (os.getpid(), signal.SIGINT))
    unasked.start()
    assert main(["serve", "a.store", "--port", "0", "--open"]) == 130
    unasked.cancel()
    signal.signal(signal.SIGINT, before)
    ((address, page),) = shown
    assert b"Describe a picture" in page
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"open {address} (Ctrl-C ends)"
    assert said[1:] == ([] if found else ["no browser was found here to open it"])


def test_the_browser_is_left_alone_unless_asked(capsys, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda address: pytest.fail("opened"))
    monkeypatch.setattr("threading.Thread.start", Thread.run)
    _tell("http://127.0.0.1:8000", False)
    assert capsys.readouterr().out == "open http://127.0.0.1:8000 (Ctrl-C ends)\n"
