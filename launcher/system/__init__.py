"""Processes, devices and memory, as Linux shows them. Imports the bottom modules only."""
