"""Write, find and read checkpoint files, and what Lightning leaves out of them."""
