"""The demo and the ablations. They may import anything, and nothing imports them."""
