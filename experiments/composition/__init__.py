"""The composition matrix on two pocket tasks."""
