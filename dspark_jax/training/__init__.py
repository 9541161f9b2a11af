"""Training of drafters: anchors and blocks, chunked losses, the jitted step. One process or many, one mesh."""
