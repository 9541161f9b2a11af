"""How much to verify: policies, ranking, history, cost tables and occupancy, confidence calibration in the loop."""
