"""Typed configurations: an experiment is `configs/NAME.py` with a `get_config()`; see dspark_jax.config.schema."""
