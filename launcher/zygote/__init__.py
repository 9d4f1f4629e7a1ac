"""The warm process that forks workers, and the agent's handle on it. Imports `config`, `system` and below."""
