"""What Ray adds to `qe_dist.flow`: actors, a driver, a cluster. Thin."""
