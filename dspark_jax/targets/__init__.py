"""The frozen models being accelerated: Qwen3, Llama style, mixtures of experts, Gemma 4, DeepSeek-V4."""
