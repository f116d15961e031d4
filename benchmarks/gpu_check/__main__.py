"""`python -m benchmarks.gpu_check`."""

from benchmarks.gpu_check.cli import main

raise SystemExit(main())
