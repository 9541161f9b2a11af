"""Text to training batches: chat templates and loss masks, JSONL, target-cache shards, the batch pipeline."""
