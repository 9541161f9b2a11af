"""Studies of drafters at equal budget."""
