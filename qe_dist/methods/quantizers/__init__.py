"""Weight quantizers: one file each."""
