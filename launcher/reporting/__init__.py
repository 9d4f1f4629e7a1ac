"""What people and programs are told: terminal, logs, journal, status, metrics. Imports `round` and below."""
