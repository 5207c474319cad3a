"""Files and folders: atomic writes, locks, hashes, records and the shared database."""
