"""Adapters: small trainable maps composed with frozen ones; a paper is a page."""
