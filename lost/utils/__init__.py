"""Errors, logging, versions and plots: what every room may use."""
