"""The small models that propose blocks of tokens; the loop and the trainer know them by `protocol.DrafterModel`."""
