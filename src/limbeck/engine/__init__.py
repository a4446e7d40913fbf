"""The engine: one training loop, checkpoints, resume, caches, progress. It knows no method by name."""
