"""What pytest must not import when it looks for doctests in the pages."""

collect_ignore = ["conf.py", "_build"]
