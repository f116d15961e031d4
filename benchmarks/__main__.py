"""`python -m benchmarks`."""

try:
    from benchmarks.cli import main
except ModuleNotFoundError as exc:
    raise SystemExit(f"error: {exc}; in the checkout, pip install --no-build-isolation -e '.[bench]'") from exc

raise SystemExit(main())
