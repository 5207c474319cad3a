"""Executors of jobs: in this process, in more processes of this machine, or on a Ray cluster."""
