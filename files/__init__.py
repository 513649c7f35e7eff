"""Reading and writing files that may come from strangers. Knows no format but JSON, and imports no other room."""
