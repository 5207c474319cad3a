"""`doctor`: what of a machine serves qeval, and what does not, with the command that mends it."""
