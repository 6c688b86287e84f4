"""The specification as tests: each name is a sentence of it."""
