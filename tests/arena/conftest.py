"""Makes the helpers of this folder importable in the tests of the folders below."""
