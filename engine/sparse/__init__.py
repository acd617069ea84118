"""Page selection methods behind one interface."""
