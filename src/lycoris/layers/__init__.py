"""What is a layer? Its operation and shapes, how its weight is stored, and what owns its parameters."""
