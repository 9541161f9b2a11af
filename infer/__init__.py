"""Programs that decode and measure: each runs as `python -m infer.NAME`."""
