"""The model itself: its folder, its attention over a shared prompt, its rotary positions and its optimizer."""
