"""Which lines of source files PTX was made of."""

import re

FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
PLACE = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
INSTRUCTION = re.compile(r"\s*(?:@!?%\w+\s+)?[a-z][\w.]*\s*[^:]*;")


def lines_of(ptx: str) -> set[tuple[str, int]]:
    """Those with an instruction of a kernel, by file and number; of what was inlined the place in its own function."""
    files, found = dict(FILE.findall(ptx)), set()
    place, in_kernel = None, False
    for line in ptx.splitlines():
        if ".entry " in line or ".func " in line:
            in_kernel = ".entry " in line  # functions only end launches
        elif at := PLACE.match(line):
            place = (files[at[1]], int(at[2])) if at[2] != "0" else place
        elif place and in_kernel and INSTRUCTION.match(line):
            found.add(place)
        elif line.startswith("}"):
            place = None  # of the next kernel
    return found
