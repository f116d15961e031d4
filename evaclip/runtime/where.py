"""Conditions on the rows of a store, such as `year>=2020 and caption~bicycle`, as SQL."""

import json
import re

from evaclip.errors import UserError

FOLD = "evaclip_casefold"
"""A function of SQL: `str.casefold`."""
COLUMNS = ("id", "content", "caption")
HELP = "conditions joined by 'and', each KEY OP VALUE; OP is one of = != < <= > >= ~ (contains)"

_CONDITION = re.compile(
    r"\s*(?P<key>[\w.:/-]+)\s*(?P<op><=|>=|!=|=|<|>|~)\s*(?![=<>~])(?P<value>\"[^\"]*\"|'[^']*'|.*?)\s*$"
)
_AND = re.compile(r"\s+and(?:\s+|$)(?=(?:[^\"']|\"[^\"]*\"|'[^']*')*$)", re.IGNORECASE)
_SQL = {"=": "IN (?, ?)", "!=": "NOT IN (?, ?)"}


def as_sql(where: str) -> tuple[str, list[object]]:
    """A condition of SQL on the table `rows`, and its parameters.

    Args:
        where: conditions joined by `and`. A key is `id`, `content`, `caption` or one of the metadata. A value is a
            number, `true`, `false` or text, which quotes may enclose. Rows without a key meet `!=` only.

    Raises:
        UserError: for what is none of these.

    Example:
        `as_sql("year>=2020 and caption~bicycle")`
    """
    found = [_one(text) for text in _AND.split(where)]
    return " AND ".join(sql for sql, _ in found), [value for _, values in found for value in values]


def metadata_keys(where: str) -> list[str]:
    """The keys of metadata that a condition names; raises as `as_sql`."""
    keys = [_matched(text)["key"] for text in _AND.split(where)]
    return [key for key in keys if key not in COLUMNS]


def _one(text: str) -> tuple[str, list[object]]:
    match = _matched(text)
    key, op, raw = match["key"], match["op"], match["value"]
    quoted = raw[0] in "\"'"
    text_value = raw[1:-1] if quoted else raw
    value = text_value if quoted else _value(raw)
    column, values = (key, []) if key in COLUMNS else ("metadata ->> ?", [f'$."{key}"'])
    column = f"ifnull({column}, '')" if op == "!=" else column
    if op == "~":
        # instr, unlike LIKE, takes % and _ for what they are.
        # SQLite's own lower knows the letters of ASCII alone, and is quicker.
        fold = "lower" if text_value.isascii() else FOLD
        return f"instr({fold}({column}), {fold}(?)) > 0", [*values, text_value]
    if op in _SQL:
        return f"{column} {_SQL[op]}", [*values, value, text_value]
    # SQLite holds every text for greater than every number.
    kind = " AND typeof({}) {} 'text'".format(column, "=" if isinstance(value, str) else "!=")
    return f"({column} {op} ?{kind})", [*values, value, *values]


def _matched(text: str) -> re.Match[str]:
    match = _CONDITION.match(text)
    if match is None or not match["value"]:
        raise UserError(f"the condition {text!r} can't be read; expected {HELP}, such as 'year>=2020 and caption~dog'")
    return match


def _value(raw: str) -> object:
    try:
        value = json.loads(raw)
    except ValueError:
        return raw
    # SQLite has no larger numbers, and takes them for text.
    return value if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63) else raw
