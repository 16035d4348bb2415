"""Our own Marlin."""
