"""Write, find and read checkpoint files, and add what Lightning leaves out of them."""
