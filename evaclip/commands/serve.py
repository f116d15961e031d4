"""`evaclip serve`: search in a store over HTTP, with a page for people and an API for programs."""

import argparse
import ipaddress
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaclip.atomic import reading
from evaclip.commands.parser import leaf
from evaclip.errors import UserError, counted

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY_VARIABLE = "EVACLIP_API_KEY"
_EXAMPLES = (
    "evaclip serve photos.store --open                # or without it, then open http://127.0.0.1:8000",
    "curl -F text='a red bicycle' -F top=5 http://127.0.0.1:8000/search",
    "curl -F image=@cat.jpg -F label=cat -F label=dog http://127.0.0.1:8000/label",
    "evaclip serve photos.store --host 0.0.0.0 --api-key-file key.txt",
)
_KEY_LENGTH = 16
_CPU_BATCH = 8
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def add_commands(subparsers: Any) -> None:
    """Add `serve` to the command line."""
    help = "search in a store in the browser, and by an HTTP API"
    parser = leaf(subparsers, "serve", _run, help=help, examples=_EXAMPLES)
    add = parser.add_argument
    add("store", metavar="STORE", type=Path, help="folder of the store, as 'evaclip index' makes it")
    add("--host", default="127.0.0.1", help="address to listen at; any but this machine's own needs an API key")
    add("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    help = f"file with the API key that requests must send, in one line (default: the variable {KEY_VARIABLE}, if set)"
    add("--api-key-file", type=Path, metavar="FILE", help=help)
    add("--open", action="store_true", help="open the page in the browser")
    add = parser.add_argument_group("compute").add_argument
    add("--model", help="the store's model, if it has moved (default: as indexed)")
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    add("--threads", type=int, metavar="N", help="threads that decode (default: one per core, 8 at most)")
    add("--batch-size", type=int, metavar="N", help="encoded at once (default: 8, on a GPU 256)")
    help = "milliseconds that a request waits for others to be encoded with (default: %(default)g)"
    add("--delay", type=float, default=3.0, metavar="MS", help=help)


def _run(args: argparse.Namespace) -> None:
    key, local = _key(args.api_key_file), _is_loopback(args.host)
    if key is None and not local:
        raise UserError(
            f"--host {args.host} lets other machines in, which needs a key: give --api-key-file or {KEY_VARIABLE}"
        )
    if not 0 <= args.port <= 65535 or not 0 <= args.delay <= 1000:
        raise UserError(f"--port is 0 to 65535 and --delay 0 to 1000, got {args.port} and {args.delay:g}")
    # Imported here so that `evaclip --help` doesn't wait for torch.
    import uvicorn

    app = _app(args, key, (*_LOOPBACK, args.host) if local else ("*",))

    class Server(uvicorn.Server):
        """Prints its address when it is ready."""

        async def startup(self, sockets: list[Any] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                address = _address(args.host, self.servers[0].sockets[0].getsockname()[1])
                print(f"open {address} (Ctrl-C ends)", flush=True)
                if args.open:
                    # Some browsers return when they are closed, and wait for the server until then.
                    threading.Thread(target=_show, args=(address,), daemon=True).start()

    Server(uvicorn.Config(app, args.host, args.port, log_level="warning", timeout_graceful_shutdown=5)).run()


def _require_free(host: str, port: int) -> None:
    """Raise UserError now, before the model is loaded, where nothing can listen at the address."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as exc:
        raise UserError(
            f"cannot listen at {host}, port {port}: {exc.strerror}; --port 0 takes any port that is free"
        ) from exc


def _show(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        print("no browser was found here to open it", flush=True)


def _app(args: argparse.Namespace, key: str | None, hosts: tuple[str, ...]) -> "FastAPI":
    from evaclip.runtime.encoder import Encoder
    from evaclip.runtime.indexing import describe
    from evaclip.runtime.store import Store
    from evaclip.serve import create_app

    store = Store.open(args.store)
    _require_free(args.host, args.port)
    options = {"batch_size": args.batch_size, "threads": args.threads, "precision": store.model["precision"]}
    options["max_patches"] = store.model.get("max_patches")
    encoder = Encoder(args.model or store.model["given"], device=args.device, **options)
    if args.batch_size is None and encoder.device.type == "cpu":
        # Later requests wait for a whole batch.
        encoder.batch_size = _CPU_BATCH
    store.require_model(describe(encoder))
    print(f"{args.store}: {counted(len(store), 'image')}, {encoder.name} on {encoder.device}", flush=True)
    return create_app(store, encoder, key=key, hosts=hosts, delay=args.delay / 1000)


def _key(file: Path | None) -> str | None:
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
    else:
        with reading(file):
            key = file.read_text(encoding="utf-8")
    if key is None:
        return None
    key = key.strip()
    if len(key) < _KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise UserError(
            f"the key in {file or KEY_VARIABLE} has {len(key)} characters; expected {_KEY_LENGTH} or more of ASCII in"
            " one line, such as 'openssl rand -hex 32' makes"
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
