"""Verify-length scheduling: policies, ranking, history, cost tables and occupancy, calibration in the loop."""
