"""A run in storage: found, written, committed, pruned.

Free of torch. Imports `format`, `storage` and below.
"""
