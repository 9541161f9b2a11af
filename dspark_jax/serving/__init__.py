"""Requests in, generations out: the engine, generate and stream, profiles, calibrated temperatures."""
