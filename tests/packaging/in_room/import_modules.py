"""Imports each named module; prints the ones that fail, with the missing package.

{"evaclip.model.clip": "pydantic"}, as JSON. Any error but the absence of a package ends the program.
"""

import importlib
import json
import sys

missing: dict[str, str | None] = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps(missing))
