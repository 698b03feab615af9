"""The YAML choices of `lost`, packaged so that a wheel carries them."""
