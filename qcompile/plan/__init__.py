"""Which site gets which scheme: sites, recipes, plans. No graph, no kernel."""
