"""What the package costs and gains, measured."""
