"""Files in and out: Hugging Face targets, DeepSpec-native drafters."""
