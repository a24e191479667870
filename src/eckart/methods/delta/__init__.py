"""Storing fine-tuned models as differences from a base."""
