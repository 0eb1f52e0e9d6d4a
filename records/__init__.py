"""Records: what may stand in one, reading files of them, checking them and their videos, and foreign annotations."""
