"""What the ranks of a world exchange and agree on. `world.py` is the seam. Imports the bottom modules only."""
