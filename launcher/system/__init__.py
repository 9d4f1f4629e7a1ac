"""What Linux says of processes, devices and memory. Imports the bottom modules only."""
