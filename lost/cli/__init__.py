"""One small file per command; `lost.cli.main` is the front door."""
