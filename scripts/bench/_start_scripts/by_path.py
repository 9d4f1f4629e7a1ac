"""A script that runs another file by its path, as launchers of experiments do."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("titan") / "train.py"))["main"]()
