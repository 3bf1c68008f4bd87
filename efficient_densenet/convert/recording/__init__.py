"""Records a forward pass as a graph, on a copy of the module without values."""
