"""Models: their weights, tokenizer and structure, from the hub, a folder, a GGUF file or memory."""
