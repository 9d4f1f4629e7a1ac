"""Who takes part in a job and where the nodes meet: the agent's client of its team, and the member process.

Torch is imported in `member/` only. Imports `system` and below.
"""
