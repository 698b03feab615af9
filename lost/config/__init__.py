"""Typed settings, their rules, and how a command line becomes them. Imports neither torch nor Hydra."""
