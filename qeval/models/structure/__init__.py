"""The structure of a model, traced: its linears, groups, head and weights."""
