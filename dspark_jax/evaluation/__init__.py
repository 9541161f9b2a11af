"""Measurements of drafters and engines: acceptance, conformance, evaluation sets, timing, traffic, the simulator."""
