"""The warm process that forks the workers, and the agent's handle on it.

`server.py` is the flow in the process. Imports `config`, `system` and below; the process itself only `system`.
"""
