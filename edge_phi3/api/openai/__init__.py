"""OpenAI's API: chat completions, completions, models. A client of theirs changes one URL."""
