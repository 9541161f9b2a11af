"""Programs that make data and train: each runs as `python -m train.NAME`."""
