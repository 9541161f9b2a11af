"""The training step timed alone: python -m train.bench."""
