"""`python -m benchmarks`."""

try:
    from evaclip.machine import limit_spinning

    limit_spinning()  # before torch is imported
    from benchmarks.cli import main
except ModuleNotFoundError as exc:
    raise SystemExit(f"error: {exc}; in the checkout, pip install --no-build-isolation -e '.[bench]'") from exc

raise SystemExit(main())
