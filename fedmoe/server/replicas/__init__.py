"""Several coordinators of one federation: ownership with a fence, forwarding, uploads handed to the owner."""
