"""Object stores: places at s3:// and gs://, the folders on this machine that stand for them, one writer at a time."""
