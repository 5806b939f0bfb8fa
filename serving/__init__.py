"""Everything inference needs: reading checkpoints, compressed modules, and the plugins for other frameworks."""
