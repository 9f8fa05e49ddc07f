"""One device: the algebra of state maps, the reference recurrence, the operators. Needs torch alone."""
