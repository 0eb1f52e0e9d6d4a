"""Videos: which frames to take at what size, decoding them, and the processes and the cache that do it ahead."""
