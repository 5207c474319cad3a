"""Runs of one token hash over time: a database of their figures, a table, a page, and the points where they change."""
