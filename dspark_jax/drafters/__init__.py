"""The small models that propose blocks of tokens; loop and trainer know them by a protocol."""
