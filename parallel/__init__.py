"""One job: the dp x cp mesh, the loss and gradient rule, the engine, checkpoints."""
