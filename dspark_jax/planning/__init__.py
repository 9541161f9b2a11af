"""Programs for hardware that is not here: abstract runs, memory estimates, compilation for named topologies."""
