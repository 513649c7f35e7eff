"""Reading and writing files that strangers may have made: the ground floor, which knows of no format but JSON."""
