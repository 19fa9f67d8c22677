"""Checkpoint -> GGUF -> quantised GGUF. Offline: never imports the service."""
