"""Conversations and target caches: prompt sources, corpora, answers by the engine or a server, the cache builder."""
