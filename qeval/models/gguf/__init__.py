"""GGUF files: their header, settings, tokenizer and tensors as transformers takes them."""
