"""The HTTP server: clients' APIs (openai, a1111) in front of one queue, and one worker process that owns the models."""
