"""Plans for hardware that is not attached: abstract runs, memory estimates, compilation for named topologies."""
