"""Results as tables for a terminal, a pipe or a log."""
