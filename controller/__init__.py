"""Wires everything together: HTTP, gRPC, the ledger, the supervisor, the command line."""
