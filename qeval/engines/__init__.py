"""What generates: one Protocol over the runtimes that a user would serve a variant with, and a fake for tests."""
