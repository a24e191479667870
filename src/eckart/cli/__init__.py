"""The command line: one command per verb. Nothing here imports torch before a command runs."""
