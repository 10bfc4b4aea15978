"""A smaller model becomes a better model, a score or a checkpoint. Never imports the search room."""
