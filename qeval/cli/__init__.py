"""The command line: flags, progress bars, tables and exit codes over the functions of `qeval.api`."""
