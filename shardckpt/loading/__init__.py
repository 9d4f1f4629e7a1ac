"""Load a checkpoint: manifest -> plan -> fetch -> verify -> apply.

`load.py` is the flow. Imports `saver`, `state`, `run` and below.
"""
