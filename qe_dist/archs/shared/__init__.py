"""What architectures have in common."""
