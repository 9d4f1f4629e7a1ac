"""What a checkpoint is, as bytes and as values; pure: no I/O, no torch. Imports `errors` only."""
