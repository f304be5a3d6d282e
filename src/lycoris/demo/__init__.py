"""A small model, real images and settings that make a first result on a CPU in minutes."""
