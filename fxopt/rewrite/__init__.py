"""How a graph is changed: pattern, rule, builder, driver."""
