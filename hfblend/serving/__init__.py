"""Serving: blended prompts in Transformers' own continuous batching. `engine.py` alone knows that."""
