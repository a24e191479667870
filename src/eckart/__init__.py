"""eckart."""
