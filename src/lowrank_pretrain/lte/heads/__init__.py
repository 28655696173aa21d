"""Give layers heads, and keep what is known of them."""
