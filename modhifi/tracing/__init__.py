"""One watched forward pass, in which coupled components are found."""
