"""What happens in a round, and what comes after it; pure. Imports `diagnosis`, `rendezvous` and below."""
