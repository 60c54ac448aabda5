"""Running graphs: node by node, in lanes, with what each node costs."""
