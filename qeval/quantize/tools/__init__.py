"""Other tools as quantizers: each an adapter of a page, absent unless its package is installed."""
