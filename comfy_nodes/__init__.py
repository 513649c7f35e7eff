"""The nodes by theme: each declares its schema and calls one function of the pack."""
