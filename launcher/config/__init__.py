"""What the job is: options, environment, configuration file and scheduler, merged and validated.

Imports `system` and below.
"""
