"""Training networks on real images."""
