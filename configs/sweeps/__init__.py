"""Sweeps for `python -m train.sweep configs/sweeps/NAME.py`; each has a `get_sweep()`."""
