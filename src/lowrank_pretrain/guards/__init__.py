"""End a run that has gone wrong, and name the cause."""
