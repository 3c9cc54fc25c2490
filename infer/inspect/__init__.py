"""Named activations of a forward pass, and the page that shows them."""
