"""The frozen models being accelerated."""
