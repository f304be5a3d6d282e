"""A small model, real images, and settings that give a first result on a CPU in minutes."""
