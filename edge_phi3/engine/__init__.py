"""Many requests on one llama.cpp model: continuous batching, shared prompts, a prefix cache."""
