"""`evaclip search`: what a store has that is nearest to a text or an image."""

import argparse
import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError, counted

if TYPE_CHECKING:
    from evaclip.runtime.store import Row, Store


def add_commands(subparsers: Any) -> None:
    """Adds `search` to the command line."""
    parser = leaf(
        subparsers,
        "search",
        help="find the pictures of a store that are nearest to a text or a picture",
        examples=[
            "evaclip search photos.store 'a red bicycle'",
            "evaclip search photos.store 'a beach' --where \"year >= 2020 and contains(caption, 'sunset')\"",
            "evaclip search photos.store --image bicycle.jpg --top 50 --html found.html",
        ],
    )
    parser.add_argument("store", metavar="STORE", type=Path, help="folder that 'evaclip index' made")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what to look for")
    parser.add_argument("--image", type=Path, metavar="FILE", help="search by this image, together with the text")
    parser.add_argument("--minus", metavar="TEXT", help="and unlike this text")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--where",
        metavar="SQL",
        help="among rows that meet a condition on id, caption and metadata: \"year >= 2020 and id glob '*.png'\"",
    )
    parser.add_argument(
        "--approximate", action="store_true", help="by the index that 'evaclip index --approximate' made; may miss some"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the thumbnails")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for it. Nothing of it imports torch, but for --image.
    from evaclip.runtime.search import search
    from evaclip.runtime.store import Store

    # An empty text, as of a variable of the shell that isn't set, is none.
    args.text, args.minus = args.text or None, args.minus or None
    if args.text is None and args.image is None:
        raise UserError("nothing to look for: give a TEXT or --image FILE")
    if args.html:
        from evaclip.atomic import require_writable, write_text

        require_writable(args.html)
    with Store.open(args.store) as store:
        if args.approximate:
            from evaclip.runtime.approximate import search_approximate as search
        scores, numbers = search(store, _query(store, args), args.top, args.where)
        found = list(zip(scores.tolist(), store.rows(numbers), strict=True))
        if not found and not args.json:
            print(f"none of {counted(len(store), 'picture')}" + (f" meets {args.where!r}" if args.where else ""))
    if args.html:
        write_text(args.html, _page(_title(args), found))
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


def _page(title: str, found: "list[tuple[float, Row]]") -> str:
    cards = "\n".join(_card(score, row) for score, row in found)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2rem; color-scheme: light dark; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; overflow-wrap: anywhere; }} img {{ width: 100%; }} small {{ opacity: .7; }}
</style>
<h1>{html.escape(title)}</h1>
<main>
{cards}
</main>
</html>
"""


def _card(score: float, row: "Row") -> str:
    name, caption = html.escape(row.id), html.escape(row.caption)
    picture = ""
    if row.thumbnail:
        data = base64.b64encode(row.thumbnail).decode()
        kind = "webp" if row.thumbnail[8:12] == b"WEBP" else "png" if row.thumbnail[1:4] == b"PNG" else "jpeg"
        picture = f'<img alt="{caption}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption} <small>{score:.3f} {name}</small></figcaption></figure>"
