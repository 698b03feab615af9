"""Goes on training a model that is there: on text, on conversations, or as a classifier."""
