"""Removal of credentials from model cards, trackers, reports and results."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:token|secret|password|(?:api|access|secret)[_-]?key|authorization|headers?|cookies?|credentials?)",
    re.IGNORECASE,
)
_RULES = (
    # A command may hold anything, such as curl's -H 'Authorization: ...'.
    (re.compile(r"pipe:.*", re.DOTALL), f"pipe:{HIDDEN}"),
    (re.compile(r"(?<=://)[^\s/?#]*@"), ""),
    # Of URLs the query and the fragment: signatures and tokens. '::' begins the next of several.
    (re.compile(r"(://(?:(?!::)[^\s?#])*)[?#](?:(?!::)\S)+"), rf"\1?{HIDDEN}"),
    (re.compile(r"(?i)\b(authorization|cookie|x-[\w-]*(?:token|key))(\s*[:=]\s*)[^\n'\"]+"), rf"\1\2{HIDDEN}"),
    (re.compile(r"\bhf_\w{16,}"), HIDDEN),
)


def redacted(value: Any) -> Any:
    """A copy of a configuration without credentials.

    Args:
        value: a text, or a tree of mappings and lists. In a text, the following is left out: commands behind `pipe:`,
            user names and passwords of URLs, their queries, HTTP headers, and tokens of Hugging Face. In a mapping,
            what a key such as `token`, `password` or `headers` holds is left out too.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, each) else redacted(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    if isinstance(value, str):
        for pattern, replacement in _RULES:
            value = pattern.sub(replacement, value)
    return value


def _is_secret(key: object, value: object) -> bool:
    return bool(value) and isinstance(value, str | Mapping | list | tuple) and bool(_SECRET_KEY.fullmatch(str(key)))
