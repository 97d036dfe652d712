"""One watched forward pass: which components lie along which axis of which tensor, and what couples them."""
