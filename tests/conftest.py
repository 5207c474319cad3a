"""What pytest must not import when it looks for doctests."""

collect_ignore = ["fixtures/preloaded.py"]  # it makes shards small in whichever process imports it
