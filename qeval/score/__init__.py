"""Scoring: sessions and sequences in, rows out."""
