"""The command line: a client of the daemon, except for the local verbs."""
