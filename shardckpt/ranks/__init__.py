"""What the ranks of a world agree on. Imports the bottom modules only."""
