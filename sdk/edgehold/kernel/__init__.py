"""One syscall or kernel file = one function, with the man page's units and errors."""
