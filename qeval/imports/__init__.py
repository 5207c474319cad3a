"""Runs made of the rows that other programs measured: lm-eval's samples, Inspect's logs, tables of scores."""
