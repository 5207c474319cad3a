"""A model behind an OpenAI-compatible address: what it says of given tokens, its log-probabilities of a few."""
