"""Studies of speed and load."""
