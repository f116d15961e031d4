"""Numbers in sentences."""


def counted(count: int, noun: str) -> str:
    """`1 row`, `1,200 rows`: of nouns that take an s."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
