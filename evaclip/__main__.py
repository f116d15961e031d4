"""`python -m evaclip`, which is what torchrun starts."""

from evaclip.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
