"""A save in the trainer: flatten, plan, stage, hand over.

`session.py` is the flow of one save, `run_saves.py` that of all saves of a run. Imports `saver`, `state`, `run`
and below.
"""
