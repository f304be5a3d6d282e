"""What do adapters cost? Operations, memory, and why."""
