"""What stands on a page that a report wrote."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects text, addresses, pictures, ids, plots and tables; complains about tags closed in the wrong order.

    Attributes:
        open: tags that were not closed.
        tables: rows of cells, each its text and what it is sorted by.
    """

    _VOID = ("meta", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.plots: list[str] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[key] or "" for key in ("src", "href", "xlink:href", "data") if key in values]
        self.images += [values] if tag == "img" else []
        self.ids += [values["id"] or ""] if "id" in values else []
        self.plots += [values["aria-label"] or ""] if tag == "svg" and "aria-label" in values else []
        self.tables += [[]] if tag == "table" else []
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append(("", values.get("data-value")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, value)
