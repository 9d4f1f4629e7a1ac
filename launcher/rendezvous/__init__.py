"""Who takes part in the job and where they meet.

Torch is imported in `member/` only. Imports `system` and below.
"""
