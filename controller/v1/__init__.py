"""Generated stubs of sparsed.admin.v1."""
