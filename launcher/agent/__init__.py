"""The agent of a node: rendezvous, start, monitor, decide, restart.

`agent.py` is the flow. Imports `reporting` and below.
"""
