"""The verbs of the command, one module a verb. `table` names them."""
