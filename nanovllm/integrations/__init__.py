"""Other systems that run the engine. Each is a package of its own, and an extra."""
