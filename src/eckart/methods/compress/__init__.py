"""Compression methods: a paper is a page, and one pipeline runs them all."""
