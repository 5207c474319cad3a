"""Models larger than memory: a decoder layer at a time, over as many tokens as memory allows."""
