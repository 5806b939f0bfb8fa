"""Search for how a byte budget is divided: between blocks, and between inputs and branches."""
