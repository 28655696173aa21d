"""Give layers heads, and keep their records."""
