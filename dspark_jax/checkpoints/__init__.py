"""Files in and out: targets (Hugging Face folders, GGUF, DeepSeek-V4), drafters in every layout, serving tables."""
