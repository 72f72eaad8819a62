"""The commands of `qe-dist`, one per file."""
