"""Distances between next-token distributions, position by position; pure."""
