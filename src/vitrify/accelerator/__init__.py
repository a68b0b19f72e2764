"""The papers' accelerators and others, simulated tile by tile. See README.md."""
