"""Models: what a file promises, the graph compiled around it, and the session that runs it."""
