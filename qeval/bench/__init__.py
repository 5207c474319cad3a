"""`qeval bench`: what quantization buys: how fast a variant runs in each engine, and what memory it takes."""
