"""Typed configurations: an experiment is `configs/NAME.py` with a `get_config()`; the classes are in `schema`."""
