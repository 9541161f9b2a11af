"""Training of drafters: anchors, losses, the jitted step, and the run around it. One process or many, one mesh."""
