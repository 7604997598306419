"""vman:///system for every libvirt client: libvirt's RPC on one side, vmand's control socket on the other."""
