"""Studies: each a question, one command, and the record of what came out."""
