"""Public functions and operators, one file per family."""
