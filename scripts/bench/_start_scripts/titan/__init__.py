"""A package that is run by `-m`, as torchtitan is: its modules import what they need when they are configured."""
