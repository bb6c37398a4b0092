"""Find the contractions and lookups of a graph, in every spelling that reaches Dynamo."""
