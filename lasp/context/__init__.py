"""One rank's view of a batch: whose tokens it holds, in which documents, and what is planned once for all layers."""
