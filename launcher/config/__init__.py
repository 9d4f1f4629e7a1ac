"""The configuration of a job: options, environment, file and scheduler, merged and validated.

Imports `system` and below.
"""
