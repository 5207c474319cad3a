"""Statistics: estimates, intervals, bounds and sequential tests; pure."""
