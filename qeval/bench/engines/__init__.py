"""Engines that generate: one Protocol over the runtimes that serve a variant, and a fake for tests."""
