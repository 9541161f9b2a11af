"""A run's configuration: its schema, the command line, serialisation, sweeps. Plain data; loads without jax."""
