"""How bytes travel: the control socket, HTTP and who is at the other end."""
