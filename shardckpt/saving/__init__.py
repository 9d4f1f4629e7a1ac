"""A save in the trainer: flatten, plan, stage, hand over.

`session.py` is the flow. Imports `saver`, `state`, `run` and below.
"""
