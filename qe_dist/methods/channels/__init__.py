"""Lists of channels that stay off the activation grid: one file each."""
