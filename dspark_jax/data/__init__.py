"""Text to training batches: chat templates and loss masks, conversation files, cache shards, the batch pipeline."""
