"""Counted floors: peaks of accelerators, operations and bytes of a training step, a plain step and a round."""
