"""Why a round failed or hangs: deaths, the verdict, stacks. Imports `system`, `run_dir` and below."""
