"""`evaclip search`: the images of a store that are nearest to a text or an image."""

import argparse
import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError, counted

if TYPE_CHECKING:
    from evaclip.runtime.store import Row, Store

_EXAMPLES = (
    "evaclip search photos.store 'a red bicycle'",
    "evaclip search photos.store 'a beach' --where \"year >= 2020 and contains(caption, 'sunset')\"",
    "evaclip search photos.store --image bicycle.jpg --top 50 --html found.html",
)


def add_commands(subparsers: Any) -> None:
    """Add `search` to the command line."""
    help = "find the images of a store that are nearest to a text or an image"
    add = leaf(subparsers, "search", _run, help=help, examples=_EXAMPLES).add_argument
    add("store", metavar="STORE", type=Path, help="folder that 'evaclip index' made")
    add("text", metavar="TEXT", nargs="?", help="what to look for")
    add("--image", type=Path, metavar="FILE", help="search by this image, together with the text")
    add("--minus", metavar="TEXT", help="and unlike this text")
    add("--top", type=int, default=10, metavar="N", help="number of results (default: %(default)s)")
    help = "among rows that meet a condition on id, caption and metadata: \"year >= 2020 and id glob '*.png'\""
    add("--where", metavar="SQL", help=help)
    help = "by the index that 'evaclip index --approximate' made; may miss some"
    add("--approximate", action="store_true", help=help)
    add("--json", action="store_true", help="print a JSON object a line")
    add("--html", type=Path, metavar="FILE", help="write a page with the thumbnails")


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for it. None of it imports torch, except for --image.
    from evaclip.atomic import require_writable, write_text
    from evaclip.runtime.search import search, search_approximate
    from evaclip.runtime.store import Store

    # An empty text, as of a variable of the shell that isn't set, is none.
    args.text, args.minus = args.text or None, args.minus or None
    if args.text is None and args.image is None:
        raise UserError("nothing to look for: give a TEXT or --image FILE")
    if args.html:
        require_writable(args.html)
    with Store.open(args.store) as store:
        find = search_approximate if args.approximate else search
        scores, numbers = find(store, _query(store, args), args.top, args.where)
        found = list(zip(scores.tolist(), store.rows(numbers), strict=True))
        if not found and not args.json:
            print(f"none of {counted(len(store), 'image')}" + (f" meets {args.where!r}" if args.where else ""))
    if args.html:
        from evaclip.report import render_template

        page = render_template("search.html", title=_title(args), found=found, address=_data_url)
        write_text(args.html, page)
    if args.json:
        for score, row in found:
            shown = {"score": score, "id": row.id, "caption": row.caption, "metadata": row.metadata}
            print(json.dumps(shown, ensure_ascii=False))
    elif found:
        _print(found)


def _query(store: "Store", args: argparse.Namespace) -> Any:
    """The sum of the queries minus the excluded ones, each of length 1."""
    texts = [text for text in (args.text, args.minus) if text is not None]
    query: Any = 0
    if args.image:
        from evaclip.runtime.text import encoder_of

        encoder = encoder_of(store)
        query = encoder.images([args.image])[0].numpy()
    if texts:
        from evaclip.runtime.text import text_encoder

        embeddings = encoder.texts(texts).numpy() if args.image else text_encoder(store)(texts)
        query = query + (embeddings[0] if args.text is not None else 0)
        query = query - (embeddings[-1] if args.minus is not None else 0)
    return query


def _print(found: "list[tuple[float, Row]]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("score", "id", "caption", box=None, header_style="dim")
    for score, row in found:
        # Text, as brackets in names aren't markup.
        table.add_row(f"{score:.3f}", Text(row.id, overflow="fold"), Text(row.caption))
    Console().print(table)


def _title(args: argparse.Namespace) -> str:
    less = f" - {args.minus}" if args.minus else ""
    return " + ".join(str(part) for part in (args.text, args.image) if part is not None) + less


def _data_url(image: bytes) -> str:
    kind = "webp" if image[8:12] == b"WEBP" else "png" if image[1:4] == b"PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
